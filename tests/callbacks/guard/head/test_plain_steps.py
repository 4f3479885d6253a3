"""The run's own plain full-batch descent on the head: its proven bound, what ends it, L_H and the largest step; the run stays as it is."""

from __future__ import annotations

from collections import OrderedDict

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria, ExpressivityGuard, RegularizedGradientClipping
from lightning_conv.callbacks.criteria.papers.kawaguchi_sun import phase_two_criteria

SWITCH = 5
SQUARED = nn.MSELoss()


class Heads(pl.Callback):
    def __init__(self):
        self.heads = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        layer = pl_module.classifier
        self.heads.append(torch.cat([layer.weight.detach().T, layer.bias.detach()[None]]).double())


def features(module, data):
    with torch.no_grad():
        hidden = module.double().eval().trunk(data.tensors[0].double())
    module.float()
    return torch.cat([hidden, torch.ones(len(hidden), 1)], 1)


@pytest.fixture
def run(make_trainer, make_module):
    def go(
        guard,
        data,
        lr=0.02,
        *,
        batch_size=96,
        optimizer=None,
        callbacks=(),
        epochs=30,
        loss_fn=SQUARED,
        module=None,
        **options,
    ):
        module = make_module(dropout=0.0) if module is None else module
        module.loss_fn = loss_fn
        make = optimizer or (lambda p: torch.optim.SGD(p, lr=lr))
        module.configure_optimizers = lambda: make(module.parameters())
        trainer = make_trainer([*([] if guard is None else [guard]), *callbacks], max_epochs=epochs, **options)
        trainer.fit(module, DataLoader(data, batch_size))
        return module, trainer

    return go


def verdicts(guard):
    return {each.name: each.verdict for each in phase_two_criteria(guard)}


def test_plain_sgd_on_whole_batches_keeps_a_bound_by_hand_and_is_not_touched(run, one_hot_digits):
    guard, heads = ExpressivityGuard(switch_at=SWITCH), Heads()
    module, trainer = run(guard, one_hot_digits, callbacks=[heads], precision="32-true")
    a, y = features(module, one_hot_digits), one_hot_digits.tensors[1].double()
    sigma = torch.linalg.svdvals(a)
    curvature, mu = (2 / 10 / 96 * float(value) ** 2 for value in (sigma[0], sigma[95]))
    assert curvature * 0.02 < 1
    assert guard.descent.curvature.lower <= curvature <= guard.descent.curvature.upper
    start = heads.heads[SWITCH]
    distance = float((torch.linalg.pinv(a) @ (y - a @ start)).norm())
    first = float((a @ start - y).square().mean())
    for t, entry in enumerate(guard.history):
        if t:
            assert entry["bound"] <= distance**2 / (2 * 0.02 * t) * (1 + 1e-6)
            assert entry["bound"] <= (1 - 0.02 * mu) ** (2 * t) * first * (1 + 1e-3)
        if SWITCH + t < len(heads.heads):
            assert entry["head_gap"] == pytest.approx(
                float((a @ heads.heads[SWITCH + t] - y).square().mean()), rel=1e-6
            )
        assert entry["gap"] <= entry["bound"] * (1 + 1e-5)
    bounds = [entry["bound"] for entry in guard.history]
    assert bounds == sorted(bounds, reverse=True)
    assert float(trainer.callback_metrics["guard/bound"]) == pytest.approx(bounds[-1])
    assert verdicts(guard) == {"head_step": "consistent", "head_bound": "consistent", "phase_two_infimum": "consistent"}
    # The steps are the optimizer's own.
    for before, after in zip(heads.heads[SWITCH:], heads.heads[SWITCH + 1 :], strict=False):
        gradient = 2 / 960 * a.T @ (a @ before - y)
        assert torch.allclose(after, before - 0.02 * gradient, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["base", "certified"])
def test_the_estimated_drift_holds_what_rounding_really_did(run, one_hot_digits, rule):
    """The run against exact descent in float64 from the same head: never further apart than the charges say."""
    guard, heads = ExpressivityGuard(switch_at=SWITCH, step_rule=rule), Heads()
    module, _ = run(guard, one_hot_digits, callbacks=[heads], epochs=120)
    a, y = features(module, one_hot_digits), one_hot_digits.tensors[1].double()
    exact, apart = heads.heads[SWITCH], []
    for t, w in enumerate(heads.heads[SWITCH:]):
        apart.append(float((w - exact).norm()))
        entry, curvature = guard.history[t], guard.descent.curvature.upper
        drift = (entry["bound_rounded"] ** 0.5 - entry["bound"] ** 0.5) / (curvature / 2) ** 0.5
        assert apart[-1] <= drift * (1 + 1e-9) + 1e-13
        exact = exact - guard.descent.step * 2 / 960 * a.T @ (a @ exact - y)
    assert apart[-1] > 1e-9  # there is something to hold
    assert drift < 1e-3


@pytest.mark.slow
def test_a_schedule_of_rates_counts_with_the_sum_of_its_steps(run, one_hot_digits):
    def scheduled(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    guard, heads = ExpressivityGuard(switch_at=SWITCH), Heads()
    module, _ = run(guard, one_hot_digits, optimizer=scheduled, callbacks=[heads], epochs=25)
    a, y = features(module, one_hot_digits), one_hot_digits.tensors[1].double()
    start = heads.heads[SWITCH]
    distance = float((torch.linalg.pinv(a) @ (y - a @ start)).norm())
    mu = 2 / 10 / 96 * float(torch.linalg.svdvals(a)[95]) ** 2
    total, kept = 0.0, float((a @ start - y).square().mean())
    for t, entry in enumerate(guard.history[1:]):
        eta = 0.05 * 0.9 ** (SWITCH + t)
        total, kept = total + eta, kept * (1 - eta * mu) ** 2
        assert entry["gap"] <= entry["bound"] <= min(distance**2 / (2 * total), kept) * (1 + 1e-3)
    assert guard.descent.step == pytest.approx(0.05 * 0.9**SWITCH)
    assert verdicts(guard)["head_bound"] == "consistent"


def test_steps_of_rate_zero_keep_the_bound_where_it_is(run, one_hot_digits):
    def stopped(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(not 5 <= epoch < 8))]

    seen = []

    class Judge(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append({each.name: each for each in phase_two_criteria(guard)})

    guard = ExpressivityGuard(switch_at=SWITCH)
    run(guard, one_hot_digits, optimizer=stopped, epochs=12, callbacks=[Judge()])
    assert len(guard.history) == 12 - SWITCH + 1
    first, *rest = guard.history
    assert all({"loss", "gap", "bound"} <= entry.keys() for entry in rest)
    assert [entry["bound"] for entry in rest[:3]] == [first["bound"]] * 3
    assert rest[3]["bound"] < first["bound"]
    # Judged in the epoch of the switch, before and after steps of rate 0, and after one that counts.
    assert [each["head_step"].verdict for each in seen[SWITCH - 1 :]] == ["undecided"] * 4 + ["consistent"] * 4
    assert seen[SWITCH - 1]["head_step"].reason == "no step of phase 2 was taken yet"
    assert seen[SWITCH]["head_step"].reason == "every step of phase 2 had rate 0 so far"


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_a_rate_above_one_over_l_h_has_no_bound_and_one_above_two_is_warned_of(run, one_hot_digits, loss):
    inputs, targets = one_hot_digits.tensors
    labels = torch.utils.data.TensorDataset(inputs, targets.argmax(1))
    data, loss_fn, smoothness = {
        "squared": (one_hot_digits, nn.MSELoss(), 2 / 10), "cross-entropy": (labels, nn.CrossEntropyLoss(), 1 / 2)
    }[loss]  # fmt: skip

    class Longer(pl.Callback):
        """From the switch on the rate is another one."""

        def __init__(self, factor):
            self.factor = factor

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == SWITCH - 2:
                sigma = torch.linalg.svdvals(features(pl_module, data))
                pl_module.train()
                limit = 96 / (smoothness * float(sigma[0]) ** 2)
                trainer.optimizers[0].param_groups[0]["lr"] = self.factor * limit

    for factor, warned in ((1.5, False), (2.6, True)):
        guard = ExpressivityGuard(switch_at=SWITCH)
        run(guard, data, lr=0.01, loss_fn=loss_fn, callbacks=[Longer(factor)], epochs=9)
        assert guard.phase == 2
        assert ("is above 2 / L_H" in guard.reason) == warned
        judged = {each.name: each for each in phase_two_criteria(guard)}
        assert judged["head_step"].verdict == "undecided"  # the theorem is silent there
        assert ("beyond which nothing is" in judged["head_step"].reason) == warned
        assert judged["head_bound"].verdict == "not applicable"
        assert "is above 1 / L_H" in judged["head_bound"].reason
        assert "bound" in guard.history[0]
        assert all("bound" not in entry for entry in guard.history[1:])


@pytest.mark.slow
def test_l_h_and_the_largest_step_are_logged_at_the_switch_whatever_the_optimizer(run, one_hot_digits):
    for options in ({"optimizer": lambda p: torch.optim.Adam(p, lr=1e-3)}, {"batch_size": 32}, {}):
        guard = ExpressivityGuard(switch_at=SWITCH)
        module, trainer = run(guard, one_hot_digits, epochs=8, **options)
        sigma = np.linalg.svd(features(module, one_hot_digits).numpy(), compute_uv=False)
        curvature = 2 / 10 / 96 * sigma[0] ** 2
        logged = {
            name: float(trainer.callback_metrics[f"guard/{name}"])
            for name in ("curvature", "largest_step", "sigma_max")
        }
        assert logged["sigma_max"] == pytest.approx(sigma[0], rel=1e-6)
        assert logged["curvature"] == pytest.approx(curvature, rel=2e-3)
        assert 2 / curvature * 0.998 <= logged["largest_step"] <= 2 / curvature * (1 + 1e-6)
    guard = ExpressivityGuard(switch_at=SWITCH)
    _, trainer = run(guard, one_hot_digits, epochs=8, loss_fn=nn.L1Loss())
    assert "guard/largest_step" not in trainer.callback_metrics


@pytest.mark.slow
def test_steps_that_are_something_else_end_the_bound(run, one_hot_digits, shrinking_sgd):
    guard = ExpressivityGuard(switch_at=SWITCH)
    run(guard, one_hot_digits, optimizer=lambda p: shrinking_sgd(0.99)(p, lr=0.02), epochs=9)
    assert "Shrinks" in guard.descent.not_covered
    real = torch.optim.SGD.step
    guard = ExpressivityGuard(switch_at=SWITCH)
    try:
        torch.optim.SGD.step = lambda self, closure=None: (real(self, closure), [
            p.data.mul_(0.999) for group in self.param_groups for p in group["params"] if p.grad is not None
        ])[0]  # fmt: skip
        run(guard, one_hot_digits, epochs=9)
    finally:
        torch.optim.SGD.step = real
    assert "moves weights whose gradient is zero" in guard.descent.not_covered  # seen before its first step
    for callbacks in ([RegularizedGradientClipping(gamma=1.0, delta=0.1)], []):
        options = {} if callbacks else {"gradient_clip_val": 1e-3}
        guard = ExpressivityGuard(switch_at=SWITCH)
        run(guard, one_hot_digits, epochs=9, callbacks=callbacks, **options)
        assert verdicts(guard)["head_bound"] == "not applicable"
        assert "clip" in guard.descent.not_covered.lower()


@pytest.mark.parametrize("rule", ["base", "certified"])
def test_what_moves_the_head_between_two_steps_ends_the_bound(run, one_hot_digits, rule):

    class Meddler(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == SWITCH + 3:
                with torch.no_grad():
                    pl_module.classifier.weight.add_(1.0)

    guard = ExpressivityGuard(switch_at=SWITCH, step_rule=rule)
    run(guard, one_hot_digits, epochs=12, callbacks=[Meddler()])
    assert "moved the head between" in guard.descent.not_covered
    assert verdicts(guard)["head_bound"] == "not applicable"


def test_a_bound_that_nobody_asked_for_is_left_out_where_it_takes_long(run, one_hot_digits, monkeypatch):
    from lightning_conv.callbacks.guard.head import plain_steps

    small, large = (plain_steps.predicted_seconds(n, n + 100) for n in (500, 5000))
    assert 500 * small < large < 2000 * small
    monkeypatch.setattr(plain_steps, "AFFORDED", 0.0)
    for rule in ("base", "certified"):
        guard = ExpressivityGuard(switch_at=SWITCH, step_rule=rule)
        run(guard, one_hot_digits, epochs=8)
        assert ("bound" in guard.history[-1]) == (rule == "certified")
        assert ("s at the switch" in guard.descent.not_covered) == (rule == "base")


def test_the_run_is_bit_for_bit_that_of_phase_two_without_a_bound(run, one_hot_digits, monkeypatch):
    from lightning_conv.callbacks.guard.head import plain_steps

    bounded = ExpressivityGuard(switch_at=SWITCH)
    with_bound, _ = run(bounded, one_hot_digits, epochs=12)
    monkeypatch.setattr(plain_steps, "not_plain", lambda *_: "not looked at")
    without = ExpressivityGuard(switch_at=SWITCH)
    plain, _ = run(without, one_hot_digits, epochs=12)
    assert "bound" in bounded.history[-1]
    assert "bound" not in without.history[-1]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in with_bound.state_dict().items())
    for name in ("loss", "gap", "step"):
        assert [entry[name] for entry in bounded.history] == [entry[name] for entry in without.history]


def on_each(make_trainer, make_regression):
    """One run on this rank, whole batches of 12 of the 24 samples on each of two."""
    pl.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator))
    trunk = nn.Sequential(nn.Linear(8, 12), nn.Softplus(10), nn.Linear(12, 40), nn.Softplus(10))
    module = make_regression(nn.Sequential(OrderedDict(trunk=trunk, head=nn.Linear(40, 3))), 0.1, nn.CrossEntropyLoss())
    guard = ExpressivityGuard(switch_at=SWITCH)
    criteria = ConvergenceCriteria("kawaguchi_sun", probe=24, every_n_steps=2)
    make_trainer([criteria, guard], max_epochs=12).fit(module, DataLoader(data, batch_size=12, shuffle=True))
    judged = {each.name: (each.verdict, each.measured, each.bound) for each in criteria.criteria}
    return {"history": guard.history, "weights": module.state_dict(), "judged": judged, "reason": guard.reason}


@pytest.mark.slow
def test_two_processes_keep_one_bound(run_on_two_processes):
    first, second = run_on_two_processes(on_each)
    assert first["history"] == second["history"]
    assert first["judged"] == second["judged"]
    assert first["reason"] == second["reason"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert len(first["history"]) == 12 - SWITCH + 1
    assert all(entry["gap"] <= entry["bound"] * (1 + 1e-6) for entry in first["history"])
    assert first["judged"]["head_bound"][0] == "consistent"
    assert first["judged"]["head_step"][0] == "consistent"
