"""The loss that equal inputs force on the whole training set, found beside a probe that holds a part of it."""

from __future__ import annotations

import copy
import functools

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import datasets, transforms

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
    rows = [{"label": Y[k], "number": torch.tensor(k), "features": {"x": X[k], "z": X[k, :2]}} for k in range(N)]
    health = judged(rows, Net(take=lambda batch: (batch["features"]["x"], batch["label"])))
    assert "Samples 7 and 251 of the training set" in found(health).sentence


def test_numbers_are_those_of_the_data_set_where_the_sampler_draws_a_part(judged):
    part = [k for k in range(N) if k not in PAIRS[1]]
    loader = DataLoader(TensorDataset(X, Y), batch_size=50, sampler=SubsetRandomSampler(part))
    finding = found(judged(loader))
    assert "Samples 7 and 251 of the training set are equal" in finding.sentence
    assert "1 such pair keeps" in finding.sentence


def images(transform):
    """Images of torchvision whose inputs are those of X, with a transform of torchvision."""
    data = datasets.MNIST.__new__(datasets.MNIST)
    data.data, data.targets = (X[:, :, None].repeat(1, 1, 6) * 40 + 128).byte(), Y
    data.transform, data.target_transform = transform, None
    return data


class Flat(Net):
    def forward(self, x):
        return self.net(x.flatten(1)[:, :6])


@pytest.mark.parametrize("transform", [transforms.ToTensor(), transforms.Compose([transforms.ToTensor()])])
def test_images_of_torchvision_are_read(judged, transform):
    assert "Samples 7 and 251 of the training set" in found(judged(images(transform), Flat())).sentence


def test_nothing_is_said_of_augmented_data(judged):
    flip = transforms.Compose([transforms.ToTensor(), transforms.RandomVerticalFlip(0.25)])
    health = judged(images(flip), Flat())
    assert found(health) is None
    assert "augmentation" in reason(health)


def test_augmentation_that_is_not_seen_at_first_is_seen_while_reading(judged, monkeypatch):
    """Some inputs are equal whichever way they are flipped; those are the ones that are tried first."""
    data = images(transforms.Compose([transforms.ToTensor(), transforms.RandomVerticalFlip(0.25)]))
    data.data[:64] = data.data[:64, :1]
    monkeypatch.setattr(Probe, "indices", lambda self, count: list(range(24)))
    health = judged(data, Flat())
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


class Kept(Dataset):
    """Keeps what it has read, with noise."""

    def __init__(self):
        self.read = functools.lru_cache(None)(lambda index: X[index] + torch.rand(()))

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.read(index), Y[index]


def own_collate(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def own_transform(image):
    return transforms.functional.to_tensor(image)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (Counting, {}, "Counting"),
        (Kept, {}, "Kept"),
        (lambda: TensorDataset(X, Y), {"collate_fn": own_collate}, "own_collate"),
        (lambda: Subset(Counting(), range(N)), {}, "Counting"),
        (lambda: ConcatDataset([TensorDataset(X[:9], Y[:9]), Counting()]), {}, "Counting"),
        (lambda: images(transforms.Compose([transforms.Lambda(own_transform)])), {}, "own_transform"),
    ],
)
def test_data_that_are_read_by_code_of_ones_own_are_not_read_more_often(judged, monkeypatch, make, options, named):
    monkeypatch.setattr(set_reader, "_reading", lambda *_: pytest.fail("it was read"))
    module = Flat() if "transform" in named else Net()
    health = judged(make(), module, **options)
    assert found(health) is None
    assert f"{named}, which is not run more often than the training steps do" in reason(health)


def test_the_run_is_the_same_bit_for_bit(make_trainer):
    ends = []
    for callbacks in ([], [ConvergenceHealth(Probe(24), every_n_steps=4)]):
        module = Net()
        pl.seed_everything(3, verbose=False)
        make_trainer(callbacks, max_epochs=2).fit(module, DataLoader(TensorDataset(X, Y), batch_size=50, shuffle=True))
        ends.append([*module.parameters(), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))
    assert found(callbacks[0]) is not None


@pytest.mark.parametrize("what", ["weights", "batches"])
def test_nothing_is_said_of_samples_that_the_run_may_never_draw(make_trainer, what):
    weights = (torch.arange(N) < 200).double()
    sampler = WeightedRandomSampler(weights, N) if what == "weights" else None
    health = ConvergenceHealth(Probe(24), every_n_steps=4)
    limits = {"limit_train_batches": 3} if what == "batches" else {}
    loader = DataLoader(TensorDataset(X, Y), batch_size=50, sampler=sampler)
    make_trainer([health], max_epochs=2, **limits).fit(Net(), loader)
    assert found(health) is None
    assert ("WeightedRandomSampler" if what == "weights" else "3 of the 6 batches") in reason(health)


def test_a_loss_without_a_known_floor_is_named_as_the_reason(judged):
    health = judged(TensorDataset(X, Y), Net(nn.CrossEntropyLoss(ignore_index=0)))
    assert found(health) is None
    assert reason(health) == "the smallest value of this loss is not known"


def test_samples_of_several_shapes_are_left_out_with_the_reason(judged, monkeypatch):
    monkeypatch.setattr(Probe, "indices", lambda self, count: list(range(24)))

    class Sums(Net):
        def __init__(self):
            super().__init__(take=lambda batch: (F.pad(batch[0], (0, 6 - batch[0].shape[1])), batch[1]))

    rows = [(X[k, : 4 if 100 <= k < 150 else 6], Y[k]) for k in range(N)]  # each batch has one shape
    health = judged(rows, Sums())
    assert found(health) is None
    assert "a sample cannot be read (RuntimeError: stack expects each tensor to be equal size" in reason(health)


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


def test_a_set_that_takes_long_or_is_large_is_not_read(judged, monkeypatch):
    monkeypatch.setattr(floor_of_set, "CHEAP", 1.0)  # of some six seconds
    read = []
    original = set_reader.SetReader.read
    monkeypatch.setattr(set_reader.SetReader, "read", lambda *args: read.append(args) or original(*args))
    original_seconds, calls = set_reader._seconds, []
    monkeypatch.setattr(set_reader, "_seconds", lambda made: calls.append(original_seconds(made)) or 0.02)
    assert "reading 300 training samples takes about 6 s" in reason(judged(TensorDataset(X, Y), epochs=1))
    assert len(calls) == 2
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
