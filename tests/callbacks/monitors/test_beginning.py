"""When the first measurement is made, what is said where it cannot be made, and that what is said works when it is followed."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_conv.callbacks import ConvergenceCriteria, ConvergenceDiagnostics, KernelStability, LambdaMin, Probe

NAMES = {each.__name__: each for each in (KernelStability, LambdaMin, ConvergenceCriteria, Probe)}
N = 8
X, Y = (torch.randn(N, size, generator=torch.Generator().manual_seed(size)) for size in (3, 2))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.seen = 0
        self.make()

    def make(self):
        self.net = nn.Linear(3, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plain(Module):
    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])


class ByName(Plain):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net.forward(batch[0]), batch[1])


class WithoutForward(Module):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net.forward(batch[0]), batch[1])


class TwoParts(Module):
    def make(self):
        self.loss_fn, self.trunk, self.head = nn.MSELoss(), nn.Linear(3, 5), nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self.head.forward(self.trunk.forward(batch[0]).tanh()), batch[1])


class TargetFirst(WithoutForward):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["b"]["x"], batch["a"]), batch_idx)


@dataclass
class Pair:
    truth: torch.Tensor
    seen: dict


class OfADataclass(WithoutForward):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.seen["x"], batch.truth), batch_idx)


class Tokens(Module):
    def make(self):
        self.net = nn.Embedding(5, 2)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net.forward(batch[0]).mean(1), batch[1])


class TwoInputs(Module):
    def forward(self, x, z):
        return self.net(x) * self.net(z)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net.forward(batch[0]) * self.net.forward(batch[1]), batch[2])


class NoLoss(Plain):
    def training_step(self, batch, batch_idx):
        self(batch[0])


class WholeBatches(Plain):
    """Asks for batches of an even size, as some contrastive losses do."""

    def training_step(self, batch, batch_idx):
        if len(batch[0]) % 2:
            raise ValueError("an even number of samples")
        return super().training_step(batch, batch_idx)


class InTrainingOnly(Plain):
    def training_step(self, batch, batch_idx):
        if not self.training:
            raise RuntimeError("not in eval mode")
        return super().training_step(batch, batch_idx)


class Broken(Plain):
    """What its step raises has no message."""

    def training_step(self, batch, batch_idx):
        if not self.training:
            raise KeyError
        return super().training_step(batch, batch_idx)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def loader(samples, **options):
    return DataLoader(samples, batch_size=4, **options)


def pairs():
    return loader(list(zip(X, Y, strict=True)))


def to_pair(samples):
    x, y = (torch.stack(each) for each in zip(*samples, strict=True))
    return Pair(y, {"x": x})


REFUSED = {
    "called by name": (ByName, pairs, "module(x)"),
    "no forward": (WithoutForward, pairs, "module.net(x)"),
    "two parts": (TwoParts, pairs, "module.head(module.trunk(x))"),
    "a nested dict": (
        TargetFirst, lambda: loader([{"a": y, "b": {"x": x}} for x, y in zip(X, Y, strict=True)]), "batch['b']['x']"
    ),
    "a dataclass": (OfADataclass, lambda: loader(list(zip(X, Y, strict=True)), collate_fn=to_pair), "batch.seen['x']"),
    "numbers of tokens": (Tokens, lambda: loader(list(zip((X.repeat(1, 2)[:, :4] > 0).long(), Y, strict=True))), "module.net(x)"),
    "two inputs": (TwoInputs, lambda: loader(list(zip(X, X + 1, Y, strict=True))), "module(*x)"),
    "no loss": (NoLoss, pairs, "module(x)"),
    "another batch": (WholeBatches, pairs, "not on 7 of them"),
    "training only": (InTrainingOnly, pairs, "not in eval mode"),
    "no message": (Broken, pairs, "KeyError: no message"),
    "an iterable": (ByName, lambda: loader(Stream()), "module(x)"),
}  # fmt: skip


def refusal(make_trainer, module, data, monitor, **options):
    with pytest.raises(MisconfigurationException) as error:
        make_trainer([monitor], max_epochs=1, **options).fit(module, data)
    assert module.trainer.global_step == 0
    return str(error.value)


def lines(message, name):
    """The callbacks that a message asks for."""
    return [part[part.index(f"{name}(") :] for part in message.split("; ") if f"{name}(" in part]


@pytest.mark.parametrize("monitor", [KernelStability, LambdaMin, ConvergenceCriteria])
@pytest.mark.parametrize("name", REFUSED)
def test_the_line_that_a_refusal_asks_for_works_when_it_is_followed(lenient, make_trainer, name, monitor):
    kind, data, expected = REFUSED[name]
    message = refusal(make_trainer, kind(), data(), monitor(probe=N, every_n_steps=1))
    assert message.startswith(f"{monitor.__name__}: the network of {kind.__name__} could not be measured on a batch of")
    assert expected in message
    line, *_ = lines(message, monitor.__name__)
    callback = eval(line, NAMES)
    make_trainer([callback], max_epochs=1).fit(kind(), data())
    assert callback.measured.startswith("the network is called as the Probe says (given)")
    assert callback.failed == []
    assert callback._last_step == 2


class Ragged(WithoutForward):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(torch.stack([self.net(each.flatten(0, -2)).mean(0) for each in batch[0]]), batch[1])


def ragged(samples):
    return [x for x, _ in samples], torch.stack([y for _, y in samples])


def of_several_kinds(samples):
    return [x if len(x) > 1 else x[None] for x, _ in samples], torch.stack([y for _, y in samples])


class Locked(Plain):
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


LENGTHS = [X[: 1 + i % 3] for i in range(N)]
NO_LINE = {
    "ragged": (Ragged, lambda: loader(list(zip(LENGTHS, Y, strict=True)), collate_fn=of_several_kinds)),
    "not to be copied": (Locked, pairs),
}


@pytest.mark.parametrize("name", [*NO_LINE, *REFUSED])
def test_training_without_a_measurement_works_when_it_is_asked_for(lenient, make_trainer, name):
    kind, data, *_ = {**REFUSED, **NO_LINE}[name]
    message = refusal(make_trainer, kind(), data(), LambdaMin())
    assert 'LambdaMin(on_error="warn") trains without measuring' in message
    plain, watched = kind(), kind()
    make_trainer([], max_epochs=1).fit(plain, data())
    monitor = eval('LambdaMin(on_error="warn")', NAMES)
    with pytest.warns(UserWarning, match="could not be measured.*Nothing is measured"):
        make_trainer([monitor], max_epochs=1).fit(watched, data())
    assert monitor.measured == ""
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_samples_of_several_kinds_are_refused_and_others_can_be_given(make_trainer):
    kind, data = NO_LINE["ragged"]
    message = refusal(make_trainer, kind(), data(), KernelStability())
    assert "give samples of one shape" in message
    given = Probe(inputs=torch.stack([X, X + 1], 1), forward_fn=lambda module, x: module.net(x).mean(1))
    monitor = KernelStability(given, every_n_steps=1)
    make_trainer([monitor], max_epochs=1).fit(kind(), data())
    assert len(monitor.state_dict()["reference"]["matrix"]) == N


@pytest.mark.parametrize("lengths", [LENGTHS, [X[:2]] * N, [X[:3]] * N, [X] * N])
def test_a_list_of_sequences_is_a_list_of_samples(make_trainer, lengths):
    monitor = KernelStability(every_n_steps=1)
    data = loader(list(zip(lengths, Y, strict=True)), collate_fn=ragged)
    make_trainer([monitor], max_epochs=1).fit(Ragged(), data)
    assert len(monitor.state_dict()["reference"]["matrix"]) == N
    assert "self.net(...) (a call for each sample)" in monitor.measured


class Coupled(Plain):
    def forward(self, x):
        return self.net(x - x.mean(0))


def infinite():
    return loader([(x / 0.0 if i == 1 else x, y) for i, (x, y) in enumerate(zip(X, Y, strict=True))])


@pytest.mark.parametrize(("kind", "data"), [(Coupled, lambda: pairs()), (Plain, infinite)])
def test_no_call_is_proposed_that_cannot_be_measured_either(make_trainer, kind, data):
    message = refusal(make_trainer, kind(), data(), KernelStability())
    assert "module(x)" not in message


def test_too_little_room_is_refused_and_fewer_samples_fit(make_trainer):
    message = refusal(make_trainer, Plain(), pairs(), LambdaMin(Probe(N, max_memory=100)))
    assert "no room" in message
    asked = eval(message[message.index("Probe(size=") :].partition(")")[0] + ")", NAMES)
    assert asked.size == N // 2
    make_trainer([LambdaMin(asked)], max_epochs=1).fit(Plain(), pairs())


def test_an_unknown_choice_is_refused():
    for make in (KernelStability, LambdaMin, ConvergenceCriteria, ConvergenceDiagnostics):
        with pytest.raises(MisconfigurationException, match="on_error='ignore' is not one of raise, warn, disable"):
            make(on_error="ignore")


def test_all_monitors_of_the_diagnostics_have_the_choice(make_trainer):
    diagnostics = ConvergenceDiagnostics(on_error="warn")
    with pytest.warns(UserWarning, match="Nothing is measured"):
        make_trainer([diagnostics], max_epochs=1).fit(ByName(), pairs())
    assert [each.on_error for each in diagnostics.callbacks[:3]] == ["warn"] * 3


def test_a_monitor_that_raises_is_not_silenced_by_one_that_warns(make_trainer):
    with (
        pytest.raises(MisconfigurationException, match="LambdaMin"),
        pytest.warns(UserWarning, match="KernelStability"),
    ):
        make_trainer([KernelStability(on_error="warn"), LambdaMin()], max_epochs=1).fit(ByName(), pairs())


class Later(Plain):
    """Its forward fails in the monitors' copy after two steps."""

    def forward(self, x):
        if not self.training and self.global_step >= 2:
            raise RuntimeError("later")
        return super().forward(x)


@pytest.mark.parametrize("choice", ["raise", "warn", "disable"])
def test_after_the_first_step_nothing_ends_the_run(lenient, make_trainer, choice):
    monitor, module = LambdaMin(N, every_n_steps=1, on_error=choice), Later()
    with pytest.warns(UserWarning, match="LambdaMin: no measurement at step 2: later"):
        make_trainer([monitor], max_epochs=3).fit(module, pairs())
    assert module.global_step == 6
    assert monitor.failed == ([2] if choice == "disable" else [2, 3, 4, 5, 6])


@pytest.mark.parametrize("part", ["record", "draw"])
@pytest.mark.parametrize("first", [True, False])
def test_a_number_or_a_figure_that_fails_ends_no_run(lenient, make_trainer, monkeypatch, part, first):
    monitor, module, calls = KernelStability(N, every_n_steps=1), Plain(), []
    original = getattr(monitor, part)

    def fails(*args):
        calls.append(1)
        if first or len(calls) > 1:
            raise MemoryError("no room for a figure")
        return original(*args)

    monkeypatch.setattr(monitor, part, fails)
    with pytest.warns(UserWarning, match="no room for a figure"):
        make_trainer([monitor], max_epochs=2).fit(module, pairs())
    assert module.global_step == 4


def test_a_fast_run_measures_two_samples_and_logs_nothing(make_trainer):
    monitor = LambdaMin()
    trainer = make_trainer([monitor], fast_dev_run=True)
    trainer.fit(Plain(), pairs())
    assert not {name for name in trainer.callback_metrics if name.startswith(("kernel", "convergence"))}
    assert monitor.state_dict() == {}


@pytest.mark.parametrize("name", [*NO_LINE, *REFUSED])
def test_a_refusal_appears_in_a_fast_run(lenient, make_trainer, name):
    kind, data, *_ = {**REFUSED, **NO_LINE}[name]
    if kind is WholeBatches:
        pytest.skip("with two samples there is none less to try")
    assert "could not be measured" in refusal(make_trainer, kind(), data(), LambdaMin(), fast_dev_run=True)
    with pytest.warns(UserWarning, match="could not be measured"):
        make_trainer([LambdaMin(on_error="warn")], fast_dev_run=True).fit(kind(), data())


def by_hand(module, x):
    """Return the trace of the kernel: the squares of all derivatives."""
    module.zero_grad()
    grads = [torch.autograd.grad(u, list(module.parameters()), retain_graph=True) for u in module(x).flatten()]
    return sum(float(g.square().sum()) for each in grads for g in each)


class Batches(IterableDataset):
    def __iter__(self):
        yield from ((X[:4], Y[:4]), (X[4:], Y[4:]))


STREAMS = {
    "samples": lambda: loader(Stream()),
    "batches": lambda: DataLoader(Batches(), batch_size=None),
    "a list of batches": lambda: DataLoader(list(Batches()), batch_size=None),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_first_batch_is_the_probe_where_samples_cannot_be_read(make_trainer, recorder, name):
    plain, watched, start = Plain(), Plain(), Plain()
    make_trainer([], max_epochs=1).fit(plain, STREAMS[name]())
    monitor = LambdaMin(every_n_steps=1)
    make_trainer([monitor], max_epochs=1, logger=recorder).fit(watched, STREAMS[name]())
    assert torch.equal(monitor.state_dict()["inputs"], X[:4])
    assert set(recorder.scalars["kernel/trace"]) == {0, 1, 2}
    assert recorder.scalars["kernel/trace"][0] == pytest.approx(by_hand(start, X[:4]), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


class Combined(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_combined_loaders_are_measured_on_their_first_batch(make_trainer, mode):
    data = CombinedLoader({"a": pairs(), "b": loader(list(X))}, mode)
    monitor = KernelStability(every_n_steps=1)
    make_trainer([monitor], max_epochs=1).fit(Combined(), data)
    assert torch.equal(monitor.state_dict()["inputs"], X[:4])


def test_a_resumed_run_keeps_the_first_batch_of_the_first_one(make_trainer, tmp_path):
    trainer = make_trainer([KernelStability(every_n_steps=1)], max_epochs=1)
    trainer.fit(Plain(), loader(Stream()))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    monitor, others = KernelStability(every_n_steps=1), DataLoader([*Batches()][::-1], batch_size=None)
    make_trainer([monitor], max_epochs=2).fit(Plain(), others, ckpt_path=tmp_path / "run.ckpt")
    assert torch.equal(monitor.state_dict()["inputs"], X[:4])


class Lazy(Plain):
    def make(self):
        self.net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))


@pytest.mark.parametrize("data", [pairs, lambda: loader(Stream())], ids=["read", "streamed"])
def test_lazy_layers_are_measured_after_the_first_step(make_trainer, recorder, data):
    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 1:
                self.trace = by_hand(module, X[: 4 if isinstance(trainer.train_dataloader.dataset, Stream) else N])

    plain, watched, keep = Lazy(), Lazy(), Keep()
    torch.manual_seed(3)
    make_trainer([], max_epochs=1).fit(plain, data())
    torch.manual_seed(3)
    make_trainer([keep, LambdaMin(every_n_steps=1)], max_epochs=1, logger=recorder).fit(watched, data())
    assert set(recorder.scalars["kernel/trace"]) == {1, 2}
    assert recorder.scalars["kernel/trace"][1] == pytest.approx(keep.trace, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_a_lazy_network_that_cannot_be_measured_after_its_first_step_trains_on(lenient, make_trainer):
    class Stuck(Lazy):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net.forward(batch[0]), batch[1]) if self.training else None

    module = Stuck()
    with pytest.warns(UserWarning, match="could not be measured"):
        make_trainer([LambdaMin()], max_epochs=1).fit(module, pairs())
    assert module.global_step == 2


def test_a_lock_in_a_module_is_shared_and_no_obstacle(make_trainer):
    module = Plain()
    module.lock = threading.Lock()
    monitor = KernelStability(N, every_n_steps=1)
    make_trainer([monitor], max_epochs=1).fit(module, pairs())
    assert monitor.measured.endswith("MSELoss (observed)")


class OneByOne(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


def test_what_is_said_of_a_batch_of_one_sample_works_when_it_is_followed(make_trainer):
    class Step(Plain):
        def training_step(self, batch):
            return F.mse_loss(self(batch[0]), batch[1])

    data = DataLoader(OneByOne(), batch_size=1)
    with pytest.raises(MisconfigurationException, match=r"Probe\(inputs=\.\.\., forward_fn=") as refused:
        make_trainer([KernelStability(every_n_steps=1)], max_steps=1).fit(Step(), data)
    assert "input_fn" not in str(refused.value)
    monitor = KernelStability(Probe(inputs=X, forward_fn=lambda module, x: module(x)), every_n_steps=1)
    make_trainer([monitor], max_steps=1).fit(Step(), data)
    assert monitor.measured.startswith("the network is called as the Probe says (given)")
