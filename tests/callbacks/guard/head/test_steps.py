"""Certified steps: the size the proof allows, the run's own gradients, a bound that the gap keeps, and the same after a resume."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ExpressivityGuard

SWITCH = 6


def features(module, data):
    """[h, 1] in float64, by hand."""
    with torch.no_grad():
        hidden = module.double().eval().trunk(data.tensors[0].double()).numpy()
    module.float()
    return np.hstack([hidden, np.ones((len(hidden), 1))])


class Steps(pl.Callback):
    """The head before each step, and its gradient."""

    def __init__(self):
        self.weights, self.gradients, self.phases = [], [], []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.weights.append(pl_module.classifier.weight.detach().double().clone())

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append(pl_module.classifier.weight.grad.detach().double().clone())


@pytest.fixture
def run(make_trainer, make_module):
    def go(
        guard, data, batch_size=96, loss_fn=None, module=None, callbacks=(), max_epochs=20, optimizer=None, **options
    ):
        module = make_module() if module is None else module
        if loss_fn is not None:
            module.loss_fn = loss_fn
        optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1))
        module.configure_optimizers = lambda: optimizer(module.parameters())
        loader = DataLoader(data, batch_size)
        trainer = make_trainer([guard, *callbacks], max_epochs=max_epochs, **options)
        trainer.fit(module, loader)
        return module, trainer

    return go


LOSSES = {"squared": (nn.MSELoss(), 2 / 10), "cross-entropy": (nn.CrossEntropyLoss(), 1 / 2)}


@pytest.mark.parametrize("name", LOSSES)
def test_a_full_batch_is_stepped_by_one_over_l_h_and_keeps_its_proven_bound(run, data, one_hot_digits, name):
    loss_fn, smoothness = LOSSES[name]
    samples = one_hot_digits if name == "squared" else data
    guard, steps = ExpressivityGuard(switch_at=SWITCH, step_rule="certified"), Steps()
    module, trainer = run(guard, samples, loss_fn=loss_fn, callbacks=[steps], max_epochs=40)
    # No momentum, no weight decay: they are the optimizer's, which does not move the head any more.
    assert (guard.phase, guard.verdict) == (2, "certified")
    eta = guard.history[-1]["step_size"]
    largest = np.linalg.svd(features(module, samples), compute_uv=False)[0]
    exact = 96 / (smoothness * largest**2)
    assert exact * 0.99 < eta <= exact
    for before, after, gradient in zip(
        steps.weights[SWITCH:], steps.weights[SWITCH + 1 :], steps.gradients[SWITCH:], strict=False
    ):
        assert torch.allclose(after, before - eta * gradient, atol=1e-6)
    entries = guard.history
    assert [entry["step"] for entry in entries] == list(range(SWITCH, 41))
    gaps, bounds = [entry["gap"] for entry in entries], [entry["bound"] for entry in entries]
    assert all(gap <= bound * (1 + 1e-6) for gap, bound in zip(gaps, bounds, strict=True))
    assert gaps == sorted(gaps, reverse=True)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < bounds[0]
    assert float(trainer.callback_metrics["guard/bound"]) == pytest.approx(bounds[-1])


def test_the_bound_is_that_of_the_minimiser_by_hand(run, one_hot_digits):
    """L_H R^2 / (2 t) with R from least squares, or the linear bound: never above the smaller one."""
    guard, steps = ExpressivityGuard(switch_at=SWITCH, step_rule="certified"), Steps()
    module, _ = run(guard, one_hot_digits, loss_fn=nn.MSELoss(), callbacks=[steps], max_epochs=30)
    values = np.linalg.svd(features(module, one_hot_digits), compute_uv=False)
    curvature, mu = (2 / 10 / 96 * value**2 for value in (values[0], values[95]))
    start = steps.weights[SWITCH].numpy()
    assert start.shape == (10, 120)
    first = guard.history[0]
    for entry in guard.history[1:]:
        t = entry["step"] - SWITCH
        linear = first["gap"] * (1 - mu / curvature) ** (2 * t)
        assert entry["gap"] <= linear * (1 + 1e-5)
        assert entry["bound"] <= linear * (1 + 1e-2)


def test_accumulated_equal_batches_that_make_up_the_set_are_a_full_batch(run, data):
    whole, parts = (ExpressivityGuard(switch_at=SWITCH, step_rule="certified") for _ in range(2))
    run(whole, data)
    run(parts, data, batch_size=32, accumulate_grad_batches=3)
    assert "bound" in parts.history[-1]
    assert len({entry["step_size"] for entry in parts.history}) == 1
    assert len(parts.history) == len(whole.history)


def test_mini_batches_take_the_schedule_and_begin_below_every_batchs_limit(run, data):
    guard, steps = ExpressivityGuard(switch_at=SWITCH, step_rule="certified"), Steps()
    module, _ = run(guard, data, batch_size=40, callbacks=[steps], max_epochs=10)
    a = features(module, data)
    curvatures = [
        0.5 / len(part) * np.linalg.svd(part, compute_uv=False)[0] ** 2 for part in (a[:40], a[40:80], a[80:])
    ]
    first = guard.history[0]["step_size"]
    assert 0.2 / max(curvatures) < first <= 1 / max(curvatures)
    for entry in guard.history:
        taken = entry["step"] - SWITCH
        assert entry["step_size"] == pytest.approx(first * (1 + taken / 1000) ** -0.75, rel=1e-12)
        assert "bound" not in entry  # those there are hold in expectation
    eta = guard.history[0]["step_size"]
    before, after, gradient = steps.weights[SWITCH], steps.weights[SWITCH + 1], steps.gradients[SWITCH]
    assert torch.allclose(after, before - eta * gradient, atol=1e-7)
    losses = [entry["loss"] for entry in guard.history]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.LBFGS, torch.optim.Adagrad])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1e-3}])
def test_the_optimizer_and_its_clipping_do_not_touch_the_head(run, data, kind, options):
    """The same steps whatever the optimizer: those of the certified rule from the same start."""
    guard, steps = ExpressivityGuard(switch_at=SWITCH, step_rule="certified"), Steps()
    run(guard, data, callbacks=[steps], optimizer=lambda p: kind(p, lr=1e-3), max_epochs=10, **options)
    eta = guard.history[-1]["step_size"]
    # LBFGS asks for the gradient several times a step in phase 1.
    gradients = steps.gradients[-4:]
    for before, after, gradient in zip(steps.weights[-4:], steps.weights[-3:], gradients, strict=False):
        assert torch.allclose(after, before - eta * gradient, atol=1e-6)
    assert guard.verdict == "certified"


def test_an_optimizer_that_moves_what_has_no_gradient_is_found_out(run, data, shrinking_sgd):
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified")
    with pytest.warns(UserWarning, match="moves the head although it has no gradient"):
        run(guard, data, optimizer=lambda p: shrinking_sgd(0.999)(p, lr=0.05))
    assert guard.verdict == "undecided"


def test_a_head_without_bias_and_one_with_a_frozen_bias(run, data, make_module):
    for frozen in (False, True):
        module = make_module()
        if frozen:
            module.classifier.bias.requires_grad_(False)
        else:
            module.classifier = nn.Linear(120, 10, bias=False)
        guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified")
        run(guard, data, module=module)
        assert guard.verdict == "certified"
        assert all(entry["gap"] <= entry["bound"] for entry in guard.history)


def test_a_rule_without_a_theorem_is_refused_at_the_start(run, data, one_hot_digits, make_module):
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified")
    with pytest.raises(MisconfigurationException, match=r"L1Loss has no Lipschitz gradient.*step_rule='base'"):
        run(guard, one_hot_digits, loss_fn=nn.L1Loss())
    module = make_module()
    module.forward = lambda x: module.classifier(module.trunk(x)).log_softmax(1)
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified", head="classifier", loss_fn=nn.NLLLoss())
    with pytest.raises(MisconfigurationException, match="something follows the head"):
        run(guard, data, module=module)


OTHERS = {
    "scaled": lambda loss, module: 96 * loss,
    "with a term of its own": lambda loss, module: loss + 0.1 * module.classifier.weight.square().sum(),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_another_loss_in_the_training_step_gives_the_certified_steps_up(run, data, make_module, name, accumulated):
    """At the switch, before any step of the rule: the run's own optimizer goes on."""
    module, seen = make_module(), []
    step = type(module).training_step

    def other(batch, batch_idx):
        seen.append(module.classifier.weight.detach().clone())
        return OTHERS[name](step(module, batch, batch_idx), module)

    module.training_step = other
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified")
    with pytest.warns(UserWarning, match="step_rule='certified' is for that loss, so the optimizer of the run goes on"):
        _, trainer = run(
            guard, data, 96 // accumulated, module=module, max_epochs=12, accumulate_grad_batches=accumulated,
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-4, weight_decay=0.1),
        )  # fmt: skip
    assert (guard.phase, guard.verdict) == (2, "undecided")
    assert "minimises something else" in guard.caveats[0]
    assert any(
        "weight decay on the head" in each for each in guard.caveats
    )  # of the optimizer that moves the head after all
    assert all("bound" not in entry and "step_size" not in entry for entry in guard.history)
    assert "guard/bound" not in trainer.callback_metrics
    at = SWITCH * accumulated
    assert not torch.equal(seen[at + accumulated], seen[-1])
    assert float((seen[-1] - seen[at]).norm()) < 0.1 * float(seen[at].norm())


def test_the_same_loss_as_a_sum_is_no_other_loss(run, data):
    guard = ExpressivityGuard(switch_at=SWITCH)
    run(guard, data, 32, loss_fn=nn.CrossEntropyLoss(reduction="sum"), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    assert (guard.phase, guard.verdict, guard.caveats) == (2, "certified", [])


def test_rounded_gradients_and_scheduled_accumulation_take_no_bound(run, data):
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified")
    run(guard, data, max_epochs=10, precision="bf16-mixed")
    assert guard.phase == 2
    assert len({entry["step_size"] for entry in guard.history}) == 1
    assert all("bound" not in entry for entry in guard.history)
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified")
    run(guard, data, max_epochs=10, callbacks=[GradientAccumulationScheduler({0: 1, 8: 2})])
    assert guard.phase == 2
    assert all("bound" not in entry for entry in guard.history)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [96, 32])
@pytest.mark.parametrize("part", [1, 3])
def test_a_run_killed_in_either_phase_resumes_to_the_same_steps_and_bounds(
    tmp_path, make_trainer, make_module, make_loader, part, batch_size
):
    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == part:
                raise KeyboardInterrupt

    def guard():
        return ExpressivityGuard(switch_at=2 * (96 // batch_size), step_rule="certified", cache_features=True)

    whole_guard, whole = guard(), make_module(dropout=0.0)
    make_trainer([whole_guard], max_epochs=6).fit(whole, make_loader(batch_size=batch_size))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer([guard(), Kill()], max_epochs=6, checkpoint=True).fit(
            make_module(dropout=0.0), make_loader(batch_size=batch_size)
        )
    resumed_guard, module = guard(), make_module(seed=9, dropout=0.0)
    make_trainer([resumed_guard], max_epochs=6).fit(
        module, make_loader(batch_size=batch_size), ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    assert resumed_guard.history == whole_guard.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
