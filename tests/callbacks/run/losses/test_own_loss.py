"""The loss of the training step from its own graph: s and S v against the formula, and what keeps it from being relied on."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from own_losses import (
    BatchNormed,
    ByHand,
    Contrastive,
    Discounted,
    Focal,
    Gaussian,
    Inside,
    Language,
    LaterUsual,
    Masked,
    Mlp,
    N,
    Pieces,
    Siamese,
    Smoothed,
    SummedQuantile,
    T,
    TwoTerms,
    V,
    collated,
    drawn,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ConvergenceCriteria, KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.run.losses.own_loss import OwnLoss

OWN = [
    Focal,
    BatchNormed,
    TwoTerms,
    Gaussian,
    SummedQuantile,
    Smoothed,
    Masked,
    Discounted,
    Pieces,
    Siamese,
    Inside,
    ByHand,
]
REDUCTIONS = {SummedQuantile: "sum", Masked: "batch"}


class Look(pl.Callback):
    def __init__(self, monitor, at=0):
        self.monitor, self.at, self.kernel = monitor, at, None

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.at:
            self.kernel, self.module = self.monitor._kernel, copy.deepcopy(module)
            self.use(trainer, module)

    def use(self, trainer, module):
        pass


def fit(make_trainer, module, monitor=None, look=None, **options):
    monitor = monitor or KernelStability(N, every_n_steps=1)
    look = look or Look(monitor)
    make_trainer([monitor, look], **({"max_epochs": 1} | options)).fit(
        module, DataLoader(module.samples(), batch_size=4)
    )
    return look, monitor


class Derivatives(Look):
    def use(self, trainer, module):
        own, rows = self.kernel.run_network.loss.own, torch.arange(N)
        self.u = self.kernel.moment().shaped_outputs
        self.v = drawn(*self.u.shape, seed=9)
        self.point = own.derivatives(self.u, rows)
        self.curved = own.curvature(self.u, rows, self.v)


@pytest.mark.parametrize("kind", OWN)
def test_value_gradient_and_curvature_are_those_of_the_formula(make_trainer, kind):
    module, monitor = kind(), KernelStability(N, every_n_steps=1)
    look = Derivatives(monitor)
    fit(make_trainer, module, monitor, look)
    loss = look.kernel.run_network.loss
    assert isinstance(loss.fn, OwnLoss)
    assert (loss.source, loss.fn.reduction) == ("observed", REDUCTIONS.get(kind, "mean"))
    assert "the loss is the step's own" in monitor.measured
    batch = torch.utils._pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, collated(module))
    u = look.u.double().requires_grad_()
    value = module.of(u.reshape(N, T, V) if isinstance(module, Language) else u, batch)
    (s,) = torch.autograd.grad(value, u, create_graph=True)
    assert look.point.value == pytest.approx(float(value), rel=1e-5)
    assert torch.allclose(look.point.slope.double(), s, rtol=1e-4, atol=1e-6)
    curved = torch.autograd.grad(s, u, look.v.double(), allow_unused=True)[0] if s.requires_grad else None
    expected = torch.zeros_like(s) if curved is None else curved
    assert torch.allclose(look.curved.double(), expected.detach(), rtol=1e-3, atol=1e-5)


USUAL = {
    "flat": (lambda m, u, b: F.cross_entropy(u.flatten(0, 1), b[0][:, 1:].flatten()), "CrossEntropyLoss over the positions"),
    "transposed": (lambda m, u, b: F.cross_entropy(u.transpose(1, 2), b[0][:, 1:]), "CrossEntropyLoss over the positions"),
    "padding": (
        lambda m, u, b: F.cross_entropy(u.flatten(0, 1), b[0][:, 1:].flatten(), ignore_index=3),
        "CrossEntropyLoss(ignore_index=3) over the positions",
    ),
    "a sum over the tokens": (
        lambda m, u, b: F.cross_entropy(u.flatten(0, 1), b[0][:, 1:].flatten(), reduction="sum"),
        "CrossEntropyLoss(reduction='sum') over the positions",
    ),
    "a part": (lambda m, u, b: 0.3 * F.cross_entropy(u.transpose(1, 2), b[0][:, 1:]), "0.3 x CrossEntropyLoss over the positions"),
    "log-likelihood": (
        lambda m, u, b: -u.log_softmax(-1).gather(2, b[0][:, 1:, None]).mean(), "CrossEntropyLoss over the positions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_losses_token_by_token_are_named(make_trainer, name):
    formula, words = USUAL[name]
    look, monitor = fit(make_trainer, type("Net", (Language,), {"of": formula})())
    assert f"the loss is {words} with the targets 1 ahead (observed)" in monitor.measured
    loss, u = look.kernel.run_network.loss, look.module.outputs(collated(look.module)).detach()
    assert float(loss.fn(u, loss.targets)) == pytest.approx(float(formula(None, u, collated(look.module))), rel=1e-5)


def test_labels_that_are_shifted_inside_the_step_are_named(make_trainer):
    class Causal(Language):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    assert "CrossEntropyLoss over the positions with the targets 1 ahead" in fit(make_trainer, Causal())[1].measured


SCALED = {
    "twice": (lambda m, u, b: 2 * F.mse_loss(u, b[2]), "2 x MSELoss", "mean"),
    "half the squares": (lambda m, u, b: 0.5 * (u - b[2]).square().sum(), "0.5 x MSELoss(reduction='sum')", "sum"),
    "a mean over samples alone": (lambda m, u, b: (u - b[2]).square().sum(1).mean(), "3 x MSELoss", "mean"),
    "divided by a constant": (
        lambda m, u, b: (u - b[2]).square().sum() / 24, "0.0416667 x MSELoss(reduction='sum')", "sum",
    ),
    "a tenth": (lambda m, u, b: 0.1 * F.cross_entropy(u, b[1]), "0.1 x CrossEntropyLoss", "mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_multiples_of_the_usual_losses_are_named_and_sums_are_no_means(make_trainer, name):
    formula, words, reduction = SCALED[name]
    look, monitor = fit(make_trainer, type("Net", (Mlp,), {"of": formula})())
    assert f"the loss is {words} (observed)" in monitor.measured
    assert look.kernel.run_network.loss.kind.reduction == reduction


def test_the_step_size_of_a_scaled_squared_error_is_that_of_its_double_loop(make_trainer):
    """One step of gradient descent on c MSE in a linear model: |u - y|^2 shrinks as predicted, with c in the step size."""

    class Linear(Mlp):
        def build(self):
            self.net = nn.Linear(4, 3)

        def of(self, u, batch):
            return 0.5 * (u - batch[2]).square().sum(1).mean()

    module, found = Linear(), {}
    monitor = LambdaMin(Probe(N, outputs="full", precision="certified"), every_n_steps=1)
    trainer = make_trainer([monitor], max_epochs=3)
    trainer.fit(module, DataLoader(module.samples(), batch_size=N))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["kernel/contraction_predicted"] == pytest.approx(found["kernel/contraction_measured"], rel=1e-4)
    assert 0 < found["kernel/contraction_measured"] < 1


class Penalised(Focal):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-3 * sum(p.square().sum() for p in self.parameters())


class Counted(Focal):
    """A factor that the module counts itself."""

    def build(self):
        super().build()
        self.count = 0

    def of(self, u, batch):
        self.count += 1
        return (1 + 0.1 * self.count) * super().of(u, batch)


class PathNorm(Focal):
    """A penalty that hides in an output of its own, from the weights alone."""

    def of(self, u, batch):
        return super().of(u, batch) + 0.1 * self.net[0].weight.detach().norm() * self.net[2].bias.sum()


class Once(Mlp):
    """Torch has no second derivative of this loss, so that samples cannot be told apart by it."""

    def of(self, u, batch):
        return F.multi_margin_loss(u, batch[1])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Once, "could not be evaluated"),
        (Contrastive, "couples the samples"),
        (Penalised, "beside the outputs"),
        (Counted, "each time that the step is run"),
        (PathNorm, "beside the outputs"),
    ],
)
def test_a_loss_that_is_no_function_of_the_outputs_alone_is_unknown(make_trainer, kind, reason):
    look, monitor = fit(make_trainer, kind())
    assert look.kernel.run_network.loss.source == "unknown"
    assert reason in monitor.measured


class ByBackward(Focal):
    """A penalty that only the backward pass has."""

    def backward(self, loss):
        (loss + 0.01 * sum(p.square().sum() for p in self.parameters())).backward()


class ByHook(Focal):
    """A gradient that a hook doubles."""

    def build(self):
        super().build()
        self.net[0].weight.register_hook(lambda gradient: 2 * gradient)


class AfterBackward(Focal):
    """A penalty that is added to the gradients."""

    def on_after_backward(self):
        for parameter in self.parameters():
            parameter.grad.add_(parameter.detach(), alpha=0.1)


@pytest.mark.parametrize("kind", [ByBackward, ByHook, AfterBackward])
def test_a_gradient_of_the_run_that_is_another_one_makes_the_loss_unknown_once(make_trainer, kind):
    criteria = ConvergenceCriteria(probe=N, every_n_steps=1)
    with pytest.warns(UserWarning, match="the gradient of the run's own step") as warned:
        look, _ = fit(make_trainer, kind(), criteria)
    assert sum("from now on it is unknown" in str(each.message) for each in warned) == 1
    assert look.kernel.loss().source == "unknown"
    assert not [each for each in criteria.criteria if each.verdict == "certified"]
    assert any("is not known: the gradient of the run's own step" in each.reason for each in criteria.violations)


@pytest.mark.parametrize("kind", [Focal, BatchNormed, Masked, Pieces, ByHand])
def test_the_runs_own_gradient_is_the_expected_one(make_trainer, kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*from now on it is unknown")
        look, _ = fit(make_trainer, kind())
    assert look.kernel.loss().source == "observed"


class Later(Focal):
    """A loss that becomes another one in the third epoch."""

    def of(self, u, batch):
        return super().of(u, batch) if self.current_epoch < 2 else F.cross_entropy(u, batch[1])


@pytest.mark.parametrize("kind", [Later, LaterUsual])
def test_a_loss_that_changes_later_is_unknown_from_then_on_and_said_once(make_trainer, kind):
    criteria = ConvergenceCriteria(probe=N, every_n_steps=2)
    with pytest.warns(UserWarning, match="has changed since it was observed") as warned:
        look, _ = fit(make_trainer, kind(), criteria, max_epochs=4)
    assert sum("from now on it is unknown" in str(each.message) for each in warned) == 1
    assert look.kernel.loss().source == "unknown"
    before = [each for each in criteria.history if each.step < 5]
    after = [each for each in criteria.history if each.step > 8]
    assert all(each.loss == each.loss for each in before)
    assert after
    assert all(each.loss != each.loss for each in after)


def test_a_change_is_remembered_in_a_checkpoint(make_trainer, tmp_path):
    first = ConvergenceCriteria(probe=N, every_n_steps=2)
    module, trainer = LaterUsual(), make_trainer([first], max_epochs=3)
    with pytest.warns(UserWarning, match="has changed since"):
        trainer.fit(module, DataLoader(module.samples(), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = ConvergenceCriteria(probe=N, every_n_steps=2)
    look = Look(second, at=9)
    module = LaterUsual()
    make_trainer([second, look], max_epochs=4).fit(
        module, DataLoader(module.samples(), batch_size=4), ckpt_path=tmp_path / "last.ckpt"
    )
    assert "has changed since" in look.kernel.loss().reason


def test_the_step_is_followed_on_its_own_loss(make_trainer):
    """With full-batch steps of the own loss the observed step is -h grad f: nothing departs, and the loss falls as it is measured."""
    criteria = ConvergenceCriteria(probe=N, every_n_steps=1)
    module = Focal()
    make_trainer([criteria], max_epochs=4).fit(module, DataLoader(module.samples(), batch_size=N))
    seen = criteria.history[0]
    assert not seen.departed
    start = Focal()
    assert seen.loss == pytest.approx(float(start.training_step(collated(start), 0)), rel=1e-5)
    assert seen.next_loss < seen.loss
    assert not [each for each in criteria.criteria if each.verdict == "certified" and "loss" in each.asks]


def test_samples_given_by_hand_have_no_loss_of_the_step(make_trainer):
    module = Focal()
    monitor = KernelStability(Probe(inputs=drawn(6, 4, seed=8), forward_fn=lambda m, x: m.net(x)), every_n_steps=1)
    look, _ = fit(make_trainer, module, monitor)
    assert look.kernel.run_network.loss.source == "unknown"
    assert "given by hand" in monitor.measured
