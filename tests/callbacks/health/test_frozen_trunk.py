"""Where the last layer alone is trained, the least loss that it can reach is said; where it is not known, why."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceHealth, Probe

DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data[:96], dtype=torch.float32) / 16, torch.tensor(DIGITS.target[:96])


class Net(pl.LightningModule):
    """A trunk and a head; what is trained is chosen by its name."""

    def __init__(self, *, width=6, inner=None, frozen=("trunk",), trained="", rate=0.5, loss=None, decay=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(64, width), inner or nn.Identity(), nn.ReLU())
        self.head = nn.Linear(width, 10)
        self.trained, self.rate, self.loss, self.decay = trained, rate, loss or nn.CrossEntropyLoss(), decay
        for name in frozen:
            self.get_submodule(name).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.loss(self.head(self.trunk(batch[0])), batch[1])

    def configure_optimizers(self):
        chosen = [each for name, each in self.named_parameters() if name.startswith(self.trained)]
        return torch.optim.SGD(chosen, lr=self.rate, momentum=0.9, weight_decay=self.decay)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.fixture
def fit(make_trainer):
    def run(module, *, steps=20, health=None, **options):
        health = health or ConvergenceHealth(Probe(96), every_n_steps=10)
        data = TensorDataset(X, options.pop("targets", Y))
        trainer = make_trainer([*options.pop("more", []), health], max_epochs=steps, **options)
        trainer.fit(module, DataLoader(data, batch_size=96), ckpt_path=None)
        found = {each.name: each for each in health.findings}
        why = next((why for why, names in health.not_judged.items() if "frozen_trunk" in names), None)
        return found.get("frozen_trunk"), why, trainer

    return run


def least_in_a_ball(module, radius, steps=4000):
    """The loss after a long accelerated descent of the last layer on the features, kept in the ball (Beck & Teboulle 2009)."""
    with torch.no_grad():
        h = torch.cat([module.trunk(X).double(), torch.ones(len(X), 1, dtype=torch.float64)], 1)
    rate = 2 * len(X) / float(torch.linalg.matrix_norm(h, 2)) ** 2
    w = before = torch.zeros(h.shape[1], 10, dtype=torch.float64)
    for k in range(steps):
        ahead = (w + k / (k + 3) * (w - before)).requires_grad_()
        (slope,) = torch.autograd.grad(module.loss(h @ ahead, Y), ahead)
        before, w = w, (ahead - rate * slope).detach()
        w = w * min(1.0, radius / float(w.norm()))
    return float(module.loss(h @ w, Y))


@pytest.mark.parametrize("frozen", [("trunk",), ()])
def test_no_head_is_better_and_one_is_as_good(fit, frozen):
    module = Net(frozen=frozen, trained="" if frozen else "head")
    found, why, _ = fit(module)
    assert why is None
    assert found.level == "notice"
    assert "Only the last layer is trained" in found.sentence
    assert "(proven for weights of a norm of at most 100)" in found.sentence  # a class can be told apart for certain
    least = least_in_a_ball(module, 100.0)
    assert found.lower <= least
    assert found.lower >= 0.98 * least
    assert found.lower <= found.upper <= 1.02 * found.lower
    with torch.no_grad():
        assert found.limit == pytest.approx(float(module.loss(module.head(module.trunk(X)), Y)), rel=1e-4)
    assert found.limit > found.lower


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.MSELoss(reduction="sum"), nn.HuberLoss()])
def test_it_is_in_the_scale_of_the_loss(fit, loss):
    target = F.one_hot(Y, 10).float()
    module = Net(loss=loss, rate=1e-4 if loss.reduction == "sum" else 0.1)
    found, why, trainer = fit(module, targets=target)
    assert why is None
    with torch.no_grad():
        assert found.limit == pytest.approx(float(loss(module.head(module.trunk(X)), target)), rel=1e-4)
    assert 0 < found.lower <= found.limit
    assert float(trainer.callback_metrics["health/frozen_trunk"]) == pytest.approx(found.lower)


def test_a_wide_trunk_forces_nothing(fit):
    found, why, _ = fit(Net(width=300))
    assert why is None
    assert found.level == "ok"
    assert "or below with the layers before it as they are" in found.sentence


def test_the_floor_is_looked_for_again_when_the_loss_has_fallen(fit):
    narrow = Net(width=40, rate=0.5)
    found, _, _ = fit(narrow, steps=300)
    assert found.upper - found.lower <= 0.1 * found.limit
    assert found.limit < 0.5


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"inner": nn.Dropout(0.5)}, "Dropout in training mode"),
        ({"inner": nn.BatchNorm1d(6)}, "BatchNorm1d in training mode"),
        ({"loss": lambda u, y: F.cross_entropy(u, y) + 0.01 * u.square().mean()}, "formula"),
    ],
)
def test_it_is_left_out_with_the_reason(fit, options, why):
    found, said, _ = fit(Net(**options))
    assert found is None
    assert why in said


@pytest.mark.parametrize("inner", [FunctionalDropout, Noise])
def test_features_that_differ_in_training_mode_by_no_layer_that_is_known(fit, inner):
    class Whole(Net):
        def __init__(self):
            super().__init__(inner=inner())
            self.net = nn.Sequential(
                self.trunk, self.head
            )  # one call, so that the measured network begins before the trunk
            del self.trunk, self.head

        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

    found, said, _ = fit(Whole(), steps=2)
    assert found is None
    assert "others in training mode" in said


def test_a_trunk_that_is_trained_is_not_spoken_of(fit):
    assert fit(Net(frozen=()))[:2] == (None, None)
    assert fit(Net(frozen=("head",)))[:2] == (None, None)


def test_its_number_does_not_stay_when_the_trunk_is_trained(fit):
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 12:
                module.trunk.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(module.trunk.parameters())})

    health = ConvergenceHealth(Probe(96), every_n_steps=10)
    found, _, trainer = fit(Net(trained="head"), steps=30, health=health, more=[Unfreeze()])
    assert found is None
    assert torch.isnan(trainer.callback_metrics["health/frozen_trunk"])
    assert torch.isfinite(trainer.callback_metrics["health/loss_floor"])


def test_weight_decay_does_not_make_it_smaller(fit):
    ends = []
    for decay in (0.0, 0.1):
        found, _, _ = fit(Net(loss=nn.MSELoss(), rate=0.1, decay=decay), targets=F.one_hot(Y, 10).float(), steps=200)
        ends.append((found.lower, found.limit))
    (one, plain), (other, decayed) = ends
    assert other == pytest.approx(one, rel=1e-12)  # of a squared loss it holds for weights of any norm
    assert decayed > plain > one


def test_the_solver_has_to_be_affordable(fit, monkeypatch):
    health = ConvergenceHealth(Probe(96), every_n_steps=10)
    monkeypatch.setattr(health, "_affords", lambda step, seconds: False)
    found, why, _ = fit(Net(), health=health)
    assert found is None
    assert "longer than the run allows" in why


def test_the_run_is_the_same_bit_for_bit(make_trainer):
    ends = []
    for callbacks in ([], [ConvergenceHealth(Probe(96), every_n_steps=10)]):
        pl.seed_everything(0, verbose=False)
        module = Net()
        make_trainer(callbacks, max_epochs=20).fit(module, DataLoader(TensorDataset(X, Y), batch_size=32, shuffle=True))
        ends.append((module.state_dict(), torch.get_rng_state()))
    (weights, generator), (others, other_generator) = ends
    assert all(torch.equal(each, others[key]) for key, each in weights.items())
    assert torch.equal(generator, other_generator)
