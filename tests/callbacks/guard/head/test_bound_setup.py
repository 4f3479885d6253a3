"""The bound of the run's own steps never takes the run down: not where it cannot be set up, not on one rank alone, not in a step."""

from __future__ import annotations

from collections import OrderedDict

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.guard.head import plain_steps, problem
from lightning_conv.callbacks.guard.head.bounded_steps import BoundedSteps
from lightning_conv.callbacks.run.data.training_set import TrainingSet
from lightning_conv.callbacks.run.data.trunk_rows import TrunkRows

SWITCH = 3


@pytest.fixture
def fit(make_trainer, make_module, one_hot_digits):
    """Plain SGD on whole batches of 96 digits."""

    def go(guard, epochs=8, **options):
        module = make_module(dropout=0.0)
        module.loss_fn = nn.MSELoss()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.02)
        make_trainer([guard], max_epochs=epochs, **options).fit(module, DataLoader(one_hot_digits, 96))
        return module

    return go


class Autoencoder(pl.LightningModule):
    """Batches of inputs alone, of which the targets are made."""

    def __init__(self, shift=1.0):
        super().__init__()
        self.shift = shift
        self.network = nn.Sequential(nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 6))
        self.loss = nn.MSELoss()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[0] + self.shift if self.shift else batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_batches_without_targets_end_no_run(make_trainer, tmp_path):
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(TensorDataset(torch.randn(20, 6)), batch_size=20)
    guard = ExpressivityGuard(switch_at=SWITCH)
    with pytest.warns(UserWarning, match="found no tensor of targets"):
        make_trainer([guard], max_epochs=5, checkpoint=True).fit(Autoencoder(), loader)
    assert guard.phase == 2
    assert "no bound could be set up" in guard.descent.not_covered
    resumed, path = ExpressivityGuard(switch_at=SWITCH), tmp_path / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="found no tensor of targets"):
        make_trainer([resumed], max_epochs=7).fit(Autoencoder(), loader, ckpt_path=path)
    assert resumed.phase == 2
    known = ExpressivityGuard(switch_at=SWITCH, target_fn=lambda batch: batch[0] + 1.0)
    make_trainer([known], max_epochs=5).fit(Autoencoder(), loader)
    assert known.descent.not_covered == ""
    observed = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([observed], max_epochs=5).fit(Autoencoder(shift=0.0), loader)
    assert observed.descent.not_covered == ""


def test_a_step_is_compared_on_devices_without_float64(on_apple):
    was, gradient = torch.randn(3, 4), torch.randn(3, 4)
    moved = was - 0.1 * gradient
    for made in (lambda t: t, lambda t: t.as_subclass(on_apple)):
        assert plain_steps.is_step(made(moved), made(was), made(gradient), 0.1)
        assert not plain_steps.is_step(made(moved), made(was), made(gradient), 0.101)


@pytest.mark.parametrize("name", ["expect", "count", "numbers"])
@pytest.mark.usefixtures("lenient")
def test_an_error_in_a_step_ends_the_bound_and_not_the_run(fit, monkeypatch, name):
    real, calls = getattr(BoundedSteps, name), []

    def fails_later(*args):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("broken later")
        return real(*args)

    monkeypatch.setattr(BoundedSteps, name, fails_later)
    guard = ExpressivityGuard(switch_at=SWITCH)
    module = fit(guard)
    assert "broken later" in guard.descent.not_covered
    assert "bound" in guard.history[0]
    assert "bound" not in guard.history[-1]
    assert {"loss", "gap"} <= guard.history[-1].keys()
    assert len(module.losses) == 8


def test_features_that_will_not_fit_are_not_computed(fit, monkeypatch):
    """Half of a quarter of this holds no 96 x 120 features in float64."""
    walked = []
    real = TrunkRows.of
    monkeypatch.setattr(TrunkRows, "of", lambda *a, **k: (walked.append(1), real(*a, **k))[1])
    fit(ExpressivityGuard(switch_at=SWITCH))
    with_bound = len(walked)
    walked.clear()
    monkeypatch.setattr(problem, "available_memory", lambda device: 4 * 100_000)
    guard = ExpressivityGuard(switch_at=SWITCH)
    fit(guard)
    assert "do not fit into memory" in guard.descent.not_covered
    assert len(walked) < with_bound


def test_the_cache_that_was_asked_for_comes_before_the_bound_that_was_not(fit, monkeypatch):
    from lightning_conv.callbacks.guard.head import phase_two, rule

    order = []
    for room, name in ((phase_two, "FeatureCache"), (rule, "watched_steps")):
        real = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    guard = ExpressivityGuard(switch_at=SWITCH, cache_features=True)
    fit(guard)
    assert order == ["FeatureCache", "watched_steps"]
    assert guard.descent.not_covered == ""
    assert all(entry["gap"] <= entry["bound"] * (1 + 1e-5) for entry in guard.history)


def one_rank_differs(make_trainer, make_regression):
    """What goes wrong on the second rank alone, or what it alone sees, is the same to both."""
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator))
    found = {}

    def fit():
        pl.seed_everything(0, verbose=False)
        trunk = nn.Sequential(nn.Linear(8, 40), nn.Softplus(10))
        network = nn.Sequential(OrderedDict(trunk=trunk, head=nn.Linear(40, 3)))
        module, guard = make_regression(network, 0.1, nn.CrossEntropyLoss()), ExpressivityGuard(switch_at=SWITCH)
        trainer = make_trainer([guard], max_epochs=5)
        trainer.fit(module, DataLoader(data, batch_size=12, shuffle=True))
        return guard.descent.not_covered

    def on_the_second(real, instead):
        def changed(*args, **kwargs):
            return instead() if torch.distributed.get_rank() == 1 else real(*args, **kwargs)

        return changed

    def fail():
        raise ValueError("broken on one rank")

    found["whole"] = fit()
    for owner, name, instead in (
        (TrainingSet, "steps_are_whole", lambda: False),
        (TrainingSet, "steps_are_whole", fail),
        (problem, "SampleLosses", fail),
        (problem, "HeadProblem", fail),
    ):
        real = getattr(owner, name)
        setattr(owner, name, on_the_second(real, instead))
        found[f"{name}, {'fails' if instead is fail else 'differs'}"] = fit()
        setattr(owner, name, real)
    return found


@pytest.mark.slow
def test_ranks_that_see_something_else_do_not_wait_for_each_other(run_on_two_processes):
    first, second = run_on_two_processes(one_rank_differs)
    assert first == second
    assert first.pop("whole") == ""
    assert "mini-batches" in first.pop("steps_are_whole, differs")
    assert len(first) == 3
    assert all("rank 1: ValueError: broken on one rank" in said for said in first.values())
