"""Phase 2 on cached features is phase 2: the same weights up to rounding, without the trunk's forward - or no cache, and why."""

from __future__ import annotations

import contextlib
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard, LambdaMin
from lightning_conv.callbacks.guard.certify.claim import Claim
from lightning_conv.callbacks.guard.head.feature_cache import sample_keys

SWITCH = 6


class Counted(nn.Module):
    """A layer that counts its calls in the training steps of phase 2."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls, self.counting = layer, 0, False

    def forward(self, x):
        self.calls += self.counting
        return self.layer(x)


class CountSteps(pl.Callback):
    def __init__(self, guard):
        self.guard, self.steps = guard, 0

    def on_train_batch_start(self, trainer, pl_module, *args):
        for module in pl_module.modules():
            if isinstance(module, Counted):
                module.counting = self.guard.phase == 2
        self.steps += self.guard.phase == 2

    def on_before_backward(self, trainer, pl_module, loss):
        for module in pl_module.modules():
            if isinstance(module, Counted):
                module.counting = False


@pytest.fixture
def run(make_trainer, make_module, make_loader):
    """Weights, calls of the trunk's first layer in training steps of phase 2, number of these steps, and what was warned of."""

    def go(cached, change=None, data=None, callbacks=(), **options):
        guard = ExpressivityGuard(switch_at=SWITCH, cache_features=cached, on_undecided="continue")
        module = make_module()
        module.trunk[0] = Counted(module.trunk[0])
        if change is not None:
            change(module)
        own = module.__dict__.get("forward")
        count = CountSteps(guard)
        trainer = make_trainer([guard, count, *callbacks], **({"max_epochs": 8} | options))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(module, data if isinstance(data, DataLoader) else make_loader(data))
        calls = sum(m.calls for m in module.modules() if isinstance(m, Counted))
        told = " ".join(str(w.message) for w in said if "cache_features" in str(w.message))
        assert "forward" not in module.trunk.__dict__
        assert module.__dict__.get("forward") is own
        assert guard.phase == 2
        return module, calls, count.steps, told, guard

    return go


def directly(module):
    """The training step calls the parts, not the module."""
    module.training_step = lambda batch, batch_idx: module.loss_fn(module.classifier(module.trunk(batch[0])), batch[1])


def flattened(module):
    """The network sits deeper, and gets its inputs flattened."""
    module.net = nn.Sequential(module.trunk, module.classifier)
    module.forward = lambda x: module.net(x.flatten(1))


CALLS = {"self(x)": None, "parts": directly, "nested": flattened}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_cached_features_give_the_same_weights_and_no_forward_of_the_trunk(run, make_loader, call, shuffled):
    data = make_loader() if shuffled else DataLoader(make_loader().dataset, 32)
    plain, plain_calls, steps, _, _ = run(False, CALLS[call], data)
    cached, calls, _, told, guard = run(True, CALLS[call], data)
    assert told == ""
    assert plain_calls == steps == 18
    assert calls == 1  # the first look-up is compared with the forward it stands for
    for name, value in plain.state_dict().items():
        if shuffled:
            assert torch.allclose(value, cached.state_dict()[name], rtol=1e-5, atol=1e-6), name
        else:  # the same batches: the same bits
            assert torch.equal(value, cached.state_dict()[name]), name
    assert guard.verdict == "undecided"  # weight decay
    losses = [entry["loss"] for entry in guard.history]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_in_every_precision(run, make_loader, precision):
    data = DataLoader(make_loader().dataset, 32)
    plain, *_ = run(False, data=data, precision=precision)
    cached, calls, steps, told, _ = run(True, data=data, precision=precision)
    assert (told, calls, steps) == ("", 1, 18)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, cached.state_dict()[name]), name


class FreshNoise(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn(x.shape), y


class SeldomNoise(TensorDataset):
    """Augments one sample only, which is not among those that are read twice."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + 0.01 * torch.randn(x.shape) if index == 5 else x), y


class Coupled(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.1, training=True)


def hooked(module):
    module.trunk[4].register_forward_hook(lambda *args: None)


def coupled(module):
    module.trunk.append(Coupled())


def random(module):
    module.trunk.append(FunctionalDropout())


def transformed(module):
    """The training step sees other inputs than the training set gives."""
    module.training_step = lambda batch, batch_idx: module.loss_fn(module(batch[0] * 1.01), batch[1])


REFUSED = {
    "hooks": (hooked, None, "has hooks"),
    "coupled": (coupled, None, "depend on the other samples"),
    "random features": (random, None, "the features are random"),
    "random inputs": (None, FreshNoise, "inputs or targets are random"),
    "other inputs": (transformed, None, "on what it makes of the batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_would_not_be_the_same_training_there_is_no_cache(run, make_loader, case):
    change, kind, said = REFUSED[case]
    data = None if kind is None else kind(*make_loader().dataset.tensors)
    with contextlib.ExitStack():
        _, calls, steps, told, _ = run(True, change, data)
    assert said in told
    assert calls == steps == 18


def test_a_sample_that_is_not_known_is_computed(run, make_loader):
    source = make_loader().dataset
    _, calls, steps, told, _ = run(True, data=SeldomNoise(*source.tensors))
    assert told == ""
    assert calls == steps // 3 + 1  # one of three batches holds it


def test_too_little_memory_is_said(run, monkeypatch):
    import lightning_conv.callbacks.guard.head.feature_cache as room

    monkeypatch.setattr(room, "available_memory", lambda device: 2**16)
    _, calls, steps, told, _ = run(True)
    assert "more than a quarter of the free" in told
    assert calls == steps


def test_the_memory_of_the_heads_device_counts_too(monkeypatch):
    """The rows are put together on the CPU, by each process, and then lie where the head is."""
    import lightning_conv.callbacks.guard.head.feature_cache as room

    free = {"cpu": 4000, "cuda": 400}
    monkeypatch.setattr(room, "available_memory", lambda device: free[device.type])
    assert room.memory_obstacle(100, torch.device("cuda"), 1) is None
    assert "(cuda)" in room.memory_obstacle(101, torch.device("cuda"), 1)
    assert room.memory_obstacle(1000, torch.device("cpu"), 1) is None
    assert "(cpu)" in room.memory_obstacle(1001, torch.device("cpu"), 1)
    assert "(cpu)" in room.memory_obstacle(501, torch.device("cpu"), 2)


class CountAll(pl.Callback):
    """Counts every call of the trunk after the first training step of phase 2, until the run is over."""

    def __init__(self):
        self.calls, self.armed, self.epochs = 0, False, 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == SWITCH + 1:
            self.armed = True
            forward = pl_module.trunk[0].forward
            pl_module.trunk[0].forward = lambda x: self.count() or forward(x)

    def count(self):
        self.calls += 1

    def on_train_epoch_end(self, *args):
        self.epochs += self.armed


def squeezed(module):
    """One output, whose dimension is dropped."""
    module.classifier = nn.Linear(module.classifier.in_features, 1)
    module.forward = lambda x: module.classifier(module.trunk(x)).squeeze(1)
    module.loss_fn = nn.MSELoss()
    module.training_step = lambda batch, batch_idx: module.loss_fn(module(batch[0]), batch[1].float())


@pytest.mark.slow
@pytest.mark.parametrize("change", [None, squeezed])
@pytest.mark.parametrize(
    "precision",
    [
        "32-true",
        pytest.param("64-true", marks=pytest.mark.slow),
        "bf16-mixed",
        pytest.param("bf16-true", marks=pytest.mark.slow),
    ],
)
def test_after_the_cache_is_filled_the_trunk_is_never_called_and_the_losses_are_the_same(
    run, make_loader, monkeypatch, precision, change
):
    """Apart from the checks, which are switched off here: they call the network on purpose."""
    for name in ("before_batch", "compare_features", "compare_loss", "compare_own_loss"):
        monkeypatch.setattr(Claim, name, lambda *_, **__: None)
    histories, calls = [], []
    for cached in (False, True):
        count = CountAll()
        data = DataLoader(make_loader().dataset, 32)
        *_, told, guard = run(cached, change, data, [count], precision=precision)
        assert told == ""
        assert count.epochs == 6
        histories.append(guard.history)
        calls.append(count.calls)
    assert calls[0] > 0
    assert calls[1] == 0
    for plain, known in zip(*histories, strict=True):
        assert known["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert known.keys() == plain.keys()


def test_where_something_follows_the_head_the_loss_is_that_of_the_whole_network(
    run, make_loader, make_trainer, make_module
):
    losses = []
    for cached in (False, True):
        module, guard = (
            make_module(dropout=0.0),
            ExpressivityGuard(switch_at=SWITCH, head="classifier", cache_features=cached),
        )
        module.forward = lambda x, module=module: module.classifier(module.trunk(x)).log_softmax(1)
        module.loss_fn = nn.NLLLoss()
        make_trainer([guard]).fit(module, DataLoader(make_loader().dataset, 32))
        losses.append([entry["loss"] for entry in guard.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_monitors_still_see_the_whole_network(run, make_loader):
    """A kernel that is measured in the middle of phase 2 is that of all parameters."""
    values = []
    for cached in (False, True):
        monitor = LambdaMin(every_n_steps=2, probe=10)
        run(cached, data=DataLoader(make_loader().dataset, 32), callbacks=[monitor])
        values.append([monitor.state_dict()["inputs"], monitor.spectrum.lambda_max.value])
    assert values[0][1] == pytest.approx(values[1][1], rel=1e-5)


def test_the_key_of_a_sample_is_its_bytes_and_how_it_is_passed():
    x = torch.randn(4, 3)
    keys = sample_keys(((x,), {}))
    assert len(set(keys)) == 4
    assert sample_keys(((x.flip(0),), {})) == keys[::-1]
    assert sample_keys(((x.double(),), {})) != keys
    assert sample_keys(((x,), {"flag": True})) != keys
    assert sample_keys(((), {"input": x})) != keys
    assert sample_keys(((x.clone().requires_grad_(),), {})) is None
    assert sample_keys(((x, object()), {})) is None
    assert sample_keys(((x, torch.randn(3)), {})) is None
    assert sample_keys(((), {})) is None
    strided = torch.randn(3, 4).T
    assert sample_keys(((strided,), {})) == sample_keys(((strided.contiguous(),), {}))
