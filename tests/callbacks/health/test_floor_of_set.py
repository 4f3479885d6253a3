"""The loss that equal inputs force on the whole training set, found beside a probe that holds a part of it."""

from __future__ import annotations

import copy
import random
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_conv.callbacks import ConvergenceHealth, Probe
from lightning_conv.callbacks.health import floor_of_set
from lightning_conv.callbacks.run.data import set_reader

N = 300
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
PAIRS = [(7, 251), (20, 31)]  # of other labels
for one, other in PAIRS:
    X[other] = X[one]
X[100] = X[40]
Y[100] = Y[40]  # the same label: no conflict
assert all(Y[one] != Y[other] for one, other in PAIRS)


class Net(pl.LightningModule):
    def __init__(self, loss_fn=None, take=lambda batch: (batch[0], batch[1])):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss_fn, self.take = nn.Linear(6, 3), loss_fn or nn.CrossEntropyLoss(), take

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = self.take(batch)
        return self.loss_fn(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def judged(make_trainer):
    """Train and return the callback."""

    def run(data, module=None, *, epochs=2, health=None, **options):
        health = health or ConvergenceHealth(Probe(24), every_n_steps=4)
        loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=50, **options)
        pl.seed_everything(0, verbose=False)
        make_trainer([health], max_epochs=epochs).fit(module or Net(), loader)
        return health

    return run


def found(health):
    return next((each for each in health.findings if each.name == "training_floor"), None)


def reason(health):
    return next((why for why, names in health.not_judged.items() if "training_floor" in names), "")


def test_pairs_are_named_by_their_numbers_in_the_training_set_with_the_floor_they_force(judged):
    finding = found(judged(TensorDataset(X, Y)))
    assert finding.sentence.startswith(
        "Samples 7 and 251 of the training set are equal and have different labels; 2 such pairs keep the loss on the training set at"
    )
    assert finding.level == "notice"
    assert finding.value == pytest.approx(2 * 2 * np.log(2) / N)  # four samples, each with two labels equally often
    assert finding.page == "docs/health.md#training-floor"


def test_squared_loss_has_the_variance_of_the_targets(judged):
    targets = F.one_hot(Y, 3).float()
    finding = found(judged(TensorDataset(X, targets), Net(nn.MSELoss())))
    assert finding.value == pytest.approx(2 * 2 * (2 * 0.25) / 3 / N)
    assert "have different targets" in finding.sentence


def test_without_conflicts_that_is_said(judged):
    finding = found(judged(TensorDataset(X, torch.zeros(N, dtype=torch.long))))
    assert finding.sentence == "No equal inputs with different labels were found in the training set."
    assert finding.level == "ok"


def test_a_probe_of_the_whole_set_says_it_alone(judged):
    health = judged(TensorDataset(X, Y), health=ConvergenceHealth(Probe(N), every_n_steps=4))
    assert found(health) is None
    assert not reason(health)
    assert any(each.name == "loss_floor" and "7 and 251" in each.sentence for each in health.findings)


def test_inputs_and_targets_are_found_where_the_step_takes_them(judged):
    class Named(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return {"label": Y[index], "number": torch.tensor(index), "features": {"x": X[index], "z": X[index, :2]}}

    health = judged(Named(), Net(take=lambda batch: (batch["features"]["x"], batch["label"])))
    assert "Samples 7 and 251 of the training set" in found(health).sentence


def test_numbers_are_those_of_the_data_set_where_the_sampler_draws_a_part(judged):
    part = [k for k in range(N) if k not in PAIRS[1]]
    loader = DataLoader(TensorDataset(X, Y), batch_size=50, sampler=SubsetRandomSampler(part))
    finding = found(judged(loader))
    assert "Samples 7 and 251 of the training set are equal" in finding.sentence
    assert "1 such pair keeps" in finding.sentence


class Augmented(Dataset):
    """Flips the sign of one sample in four."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return N

    def __getitem__(self, index):
        signs = {
            "torch": lambda: torch.rand(()) < 0.25,
            "numpy": lambda: np.random.rand() < 0.25,  # noqa: NPY002
            "python": lambda: random.random() < 0.25,
        }
        return (-X[index] if signs[self.source]() else X[index]), Y[index]


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_nothing_is_said_of_augmented_data(judged, source):
    health = judged(Augmented(source))
    assert found(health) is None
    assert "augmentation" in reason(health)


class Rarely(Dataset):
    """Changes samples late in the set only, so that those that are tried first are alike."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return (X[index] + torch.rand(()) if 64 < index < 290 else X[index]), Y[index]


def test_augmentation_that_is_not_seen_at_first_is_seen_while_reading(judged, monkeypatch):
    monkeypatch.setattr(Probe, "indices", lambda self, count: list(range(24)))
    health = judged(Rarely())
    assert found(health) is None
    assert "augmentation: an input differs when it is read again" in reason(health)


class Counting(Dataset):
    def __init__(self):
        self.reads = 0

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.reads += 1
        return X[index], Y[index]


class Drawing(Dataset):
    """Draws from a generator of its own, and does not use the number."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __len__(self):
        return N

    def __getitem__(self, index):
        torch.rand((), generator=self.generator)
        return X[index], Y[index]


def test_a_count_of_the_data_set_is_left_as_it_is_with_the_reason(judged, monkeypatch):
    monkeypatch.setattr(floor_of_set.FloorOfSet, "is_wanted", property(lambda self: False))
    without = judged(data := Counting())
    reads = data.reads
    assert not found(without)
    monkeypatch.undo()
    health = judged(data := Counting())
    assert data.reads == reads
    assert found(health) is None
    assert reason(health) == "reading a sample changes attributes of Counting, which the run would notice"


@pytest.mark.parametrize("make", [Drawing, lambda: TensorDataset(X, Y)])
def test_the_run_is_the_same_bit_for_bit(make_trainer, make):
    ends = []
    for callbacks in ([], [ConvergenceHealth(Probe(24), every_n_steps=4)]):
        module, data = Net(), make()
        pl.seed_everything(3, verbose=False)
        make_trainer(callbacks, max_epochs=2).fit(module, DataLoader(data, batch_size=50, shuffle=True))
        own = data.generator.get_state() if isinstance(data, Drawing) else torch.empty(0)
        ends.append([*module.parameters(), torch.get_rng_state(), own])
    assert all(map(torch.equal, *ends))
    assert found(callbacks[0]) is not None


def padded(samples):
    longest = max(len(x) for x, _ in samples)
    return torch.stack([F.pad(x, (0, longest - len(x))) for x, _ in samples]), torch.stack([y for _, y in samples])


def test_samples_of_several_lengths_are_left_out_with_the_reason(judged):
    class Ragged(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return X[index, : 4 if index < 40 else 6], Y[index]

    class Sums(Net):
        def forward(self, x):
            return self.net(F.pad(x, (0, 6 - x.shape[1])))

    health = judged(Ragged(), Sums(), collate_fn=padded)
    assert found(health) is None
    assert "samples have several shapes" in reason(health)


def test_data_without_random_access_have_none(judged):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    health = judged(Stream())
    assert found(health) is None


def test_a_hook_between_data_and_step_is_named(judged):
    class Moves(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    health = judged(TensorDataset(X, Y), Moves())
    assert found(health) is None
    assert "the module has its own on_after_batch_transfer" in reason(health)


@pytest.fixture
def slowly(monkeypatch):
    """Read 32 samples at a measurement."""
    monkeypatch.setattr(floor_of_set, "AT_ONCE", 0.0)


def test_it_is_read_a_little_at_a_time_and_says_how_far_it_is(judged, slowly):
    health = judged(TensorDataset(X, Y), epochs=2)
    assert found(health) is None
    assert reason(health) == "128 training samples are read so far, 43 % of them"
    whole = judged(TensorDataset(X, Y), epochs=8)
    assert "Samples 7 and 251 of the training set" in found(whole).sentence


def test_a_resumed_run_reads_on(make_trainer, slowly, tmp_path):
    def run(epochs, path=None, data=None):
        health = ConvergenceHealth(Probe(24), every_n_steps=4)
        trainer = make_trainer([health], max_epochs=epochs)
        trainer.fit(Net(), DataLoader(data or TensorDataset(X, Y), batch_size=50), ckpt_path=path)
        return health, trainer

    half, trainer = run(4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    read = half._record._set.known.read
    assert 0 < read < N
    again, trainer = run(5, tmp_path / "half.ckpt")
    assert again._record._set.known.read > read
    other, _ = run(5, tmp_path / "half.ckpt", TensorDataset(X + 1, Y))
    assert other._record._set.known.read < read  # other data are read from their beginning
    done, trainer = run(8)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    resumed, _ = run(9, tmp_path / "done.ckpt")
    assert found(resumed).sentence == found(done).sentence


class Slow(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        time.sleep(0.02)
        return X[index], Y[index]


def test_a_set_that_takes_long_or_is_large_is_not_read(judged, monkeypatch):
    monkeypatch.setattr(floor_of_set, "CHEAP", 1.0)  # of some six seconds
    read = []
    original = set_reader.SetReader.read
    monkeypatch.setattr(set_reader.SetReader, "read", lambda *args: read.append(args) or original(*args))
    assert "reading 300 training samples takes about" in reason(judged(Slow(), epochs=1))
    assert not read  # that was told from two samples
    monkeypatch.undo()
    monkeypatch.setattr(floor_of_set, "CHEAP", 0.0)
    monkeypatch.setattr(floor_of_set, "AT_ONCE", 0.0)
    assert "training samples takes about" in reason(judged(TensorDataset(X, Y)))
    monkeypatch.undo()
    monkeypatch.setattr(floor_of_set, "MOST_BYTES", 100)
    assert "too large to be kept" in reason(judged(TensorDataset(X, Y)))


def test_the_state_is_plain(judged):
    state = copy.deepcopy(judged(TensorDataset(X, Y))._record.state_dict()["set"])
    assert state["known"]["floor"]["conflicts"] == tuple(PAIRS)
    assert len(state["digests"]) == 0
    assert state["targets"] is None
