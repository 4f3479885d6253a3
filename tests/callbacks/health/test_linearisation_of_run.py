"""The error of the network linearised at the start stands in the sentence of the regime, and the run does not notice."""

from __future__ import annotations

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceHealth, KernelStability, Probe
from lightning_conv.callbacks.health import linearisation_of_run, search_along

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, :3].prod(1), X[:, 3:].sum(1).sin()], 1)
TAG = "health/linearisation_error"


class Wide(nn.Module):
    """A perceptron in the parametrisation of the tangent kernel."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(width, 8)), nn.Parameter(torch.randn(2, width))

    def forward(self, x):
        return torch.tanh(x @ self.a.T / math.sqrt(8)) @ self.b.T / math.sqrt(len(self.a))


NETWORKS = {
    "narrow": lambda: Wide(8),
    "wide": lambda: Wide(4096),
    "linear": lambda: nn.Linear(8, 2),
    "normalised": lambda: nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2)),
    "double": lambda: Wide(8).double(),
}


class Net(pl.LightningModule):
    def __init__(self, name, rate=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.rate = NETWORKS[name](), rate

    def training_step(self, batch, batch_idx):
        x, y = (each.to(next(self.parameters()).dtype) for each in batch)
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Halfway(Net):
    """Trains its first layer from step 4 on."""

    def __init__(self, name):
        super().__init__(name)
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        self.net[0].requires_grad_(self.trainer.global_step >= 4)


def monitors(**options):
    probe = Probe(24, **options)
    return [KernelStability(probe, every_n_steps=10), ConvergenceHealth(probe, every_n_steps=10)]


@pytest.fixture
def fit(make_trainer):
    def run(module, callbacks, *, steps=60, ckpt_path=None, **options):
        trainer = make_trainer(callbacks, max_epochs=steps, **options)
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=24), ckpt_path=ckpt_path)
        return trainer

    return run


def by_differences(module, start):
    """The error with J_0 (w - w_0) from a central difference of the network as it trains."""
    model, first = copy.deepcopy(module.net).double().train(), copy.deepcopy(start).double().train()
    now, origin = dict(copy.deepcopy(model).named_parameters()), dict(first.named_parameters())

    def along(h):
        with torch.no_grad():
            for name, each in model.named_parameters():
                each.copy_(origin[name] + h * (now[name] - origin[name]))
            return model(X.double())

    h = 1e-4
    change = along(1.0) - along(0.0)
    return float((change - (along(h) - along(-h)) / (2 * h)).norm() / change.norm())


@pytest.mark.parametrize("name", ["narrow", "wide", "normalised", "double"])
def test_it_is_what_finite_differences_of_the_run_say(fit, name):
    module = Net(name)
    start = copy.deepcopy(module.net)
    trainer = fit(module, monitors())
    assert float(trainer.callback_metrics[TAG]) == pytest.approx(by_differences(module, start), rel=1e-2)


@pytest.mark.parametrize(("name", "lazy"), [("narrow", False), ("wide", True), ("linear", True)])
def test_the_regime_rests_on_it(fit, name, lazy):
    _, health = callbacks = monitors()
    trainer = fit(Net(name, 0.5), callbacks, steps=120)
    error = float(trainer.callback_metrics[TAG])
    assert (error <= 0.1) is lazy
    if not lazy:
        (why,) = [reason for reason, names in health.not_judged.items() if "regime" in names]
        reason, numbers = why.split("; ")
        assert reason == "the change of the kernel lies between the limits"
        assert numbers.startswith("alignment with the kernel at the start 0.")
        assert "error of the linearised network" in numbers
        assert numbers.endswith("beyond the limits of a lazy run")
        return
    (regime,) = [each for each in health.findings if each.name == "regime"]
    assert "error of the linearised network " in regime.sentence
    assert "of what the outputs moved" in regime.sentence
    assert "trains close to its linearisation" in regime.sentence
    if name == "linear":
        assert error < 1e-4


def test_the_run_is_the_same_bit_for_bit(fit):
    ends = []
    for callbacks in ([], monitors()):
        pl.seed_everything(0, verbose=False)
        module = Net("normalised")
        fit(module, callbacks)
        ends.append((module.state_dict(), torch.get_rng_state()))
    (weights, generator), (others, other_generator) = ends
    assert all(torch.equal(each, others[key]) for key, each in weights.items())
    assert torch.equal(generator, other_generator)


@pytest.mark.parametrize("stored", [2**20, 10])
def test_a_resumed_run_goes_on_if_the_weights_of_the_start_are_few(fit, tmp_path, monkeypatch, stored):
    monkeypatch.setattr(linearisation_of_run, "STORED", stored)
    whole = fit(Net("narrow"), monitors())
    fit(Net("narrow"), monitors(), steps=30).save_checkpoint(tmp_path / "half.ckpt")
    _, health = callbacks = monitors()
    resumed = fit(Net("narrow"), callbacks, ckpt_path=tmp_path / "half.ckpt")
    if stored == 10:
        assert math.isnan(float(resumed.callback_metrics[TAG]))
        assert health.not_judged["the checkpoint has no weights of the start, as they are more than 10"] == [
            "linearisation_error"
        ]
    else:
        assert float(resumed.callback_metrics[TAG]) == float(whole.callback_metrics[TAG])


def test_it_is_left_out_with_the_reason(fit, monkeypatch):
    _, health = callbacks = monitors()
    fit(Halfway("normalised"), callbacks, steps=20)
    assert any(
        names == ["linearisation_error"] and "weights are trained that the kernel of the start is not over" in why
        for why, names in health.not_judged.items()
    )
    monkeypatch.setattr(search_along, "COPIES", 2**50)
    _, health = callbacks = monitors()
    trainer = fit(Net("narrow"), callbacks, steps=20)
    assert TAG not in trainer.callback_metrics
    assert any("take more memory than is allowed" in why for why in health.not_judged)


def test_without_a_kernel_of_the_start_it_is_not_measured(fit):
    health = ConvergenceHealth(Probe(24), every_n_steps=10)
    trainer = fit(Net("narrow"), [health], steps=20)
    assert TAG not in trainer.callback_metrics
    assert not any("linearisation_error" in names for names in health.not_judged.values())
