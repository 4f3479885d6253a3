"""Phase 2 of a guard as criteria: the gap under its bound, the step under 1 / L_H, the guard's verdict; and when none of it applies."""

from __future__ import annotations

import contextlib
import json

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ConvergenceCriteria, ConvergenceReport, ExpressivityGuard
from lightning_conv.callbacks.criteria.papers.kawaguchi_sun import phase_two_criteria

SWITCH = 4
NAMES = ("head_step", "head_bound", "phase_two_infimum")


class Bounds(pl.Callback):
    """The bounds by hand: the head and the features at the switch, and the gap at the end of every epoch, all in float64."""

    def __init__(self, data):
        self.inputs, self.targets = data.tensors
        self.heads, self.features = [], None

    def on_train_epoch_end(self, trainer, pl_module):
        layer = pl_module.classifier
        self.heads.append(torch.cat([layer.weight.detach().T, layer.bias.detach()[None]]).double())
        if len(self.heads) == SWITCH:
            # Numbers that are frozen from here on: the noise is in them, as the guard came first.
            with torch.no_grad():
                trunk = pl_module.trunk.double().eval()
                hidden = trunk(self.inputs.double())
                trunk.float()
            self.features = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)


@pytest.fixture
def run(make_trainer, make_module):
    def go(
        guard,
        data,
        *,
        batch_size=96,
        optimizer=None,
        callbacks=(),
        epochs=30,
        seed=0,
        loss_fn=None,
        fit=None,
        **options,
    ):
        module = make_module(seed=seed, dropout=0.0)
        module.loss_fn = loss_fn or nn.MSELoss()
        make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
        module.configure_optimizers = lambda: make(module.parameters())
        criteria = ConvergenceCriteria("kawaguchi_sun", probe=16, every_n_steps=3)
        watched = [criteria] if guard is None else [criteria, guard]
        trainer = make_trainer([*watched, *callbacks], max_epochs=epochs, **options)
        trainer.fit(module, DataLoader(data, batch_size), **(fit or {}))
        return criteria, trainer, module

    return go


def found(criteria):
    return {each.name: each for each in criteria.criteria if each.name in NAMES}


def test_the_gap_is_held_against_the_bound_that_a_double_loop_gives(run, one_hot_digits):
    guard, by_hand = ExpressivityGuard(switch_at=SWITCH, step_rule="certified"), Bounds(one_hot_digits)
    criteria, *_ = run(guard, one_hot_digits, callbacks=[by_hand])
    seen = found(criteria)
    assert [seen[name].verdict for name in NAMES] == ["consistent", "consistent", "consistent"]
    a, y = by_hand.features, one_hot_digits.tensors[1].double()
    samples, outputs = y.shape
    sigma = torch.linalg.svdvals(a)
    curvature, mu = (2 / outputs / samples * float(value) ** 2 for value in (sigma[0], sigma[95]))
    assert seen["head_step"].bound == pytest.approx(1 / curvature, rel=2e-3)
    assert 0.99 / curvature <= seen["head_step"].measured <= 1 / curvature

    def gap(w):
        total = 0.0
        for i in range(samples):
            for c in range(outputs):
                total += float(a[i] @ w[:, c] - y[i, c]) ** 2
        return total / samples / outputs

    start = by_hand.heads[SWITCH - 1]
    least_squares = start + torch.linalg.pinv(a) @ (y - a @ start)
    distance = float((least_squares - start).norm())
    shares = []
    for t, w in enumerate(by_hand.heads[SWITCH:], 1):
        linear = (1 - seen["head_step"].measured * mu) ** (2 * t) * gap(start)
        bound = min(distance**2 / (2 * seen["head_step"].measured * t), linear)
        # The guard knows comparators beside the minimiser: its bound is this one or less.
        entry = guard.history[t]
        assert entry["gap"] == pytest.approx(gap(w), rel=1e-4)
        assert entry["gap"] <= entry["bound"] <= bound * (1 + 1e-2)
        shares.append(entry["gap"] / entry["bound"])
    assert seen["head_bound"].measured / seen["head_bound"].bound == pytest.approx(max(shares), rel=1e-6)
    assert f"after {1 + shares.index(max(shares))} steps" in seen["head_bound"].reason
    assert all(seen[name].asks.endswith("on the training set") for name in NAMES)
    # The last measurement of the guard came after that of the criteria.
    assert f"of {len(shares)} measurements" in seen["head_bound"].reason
    assert "up to the rounding inside the trunk" in seen["phase_two_infimum"].reason
    assert seen["phase_two_infimum"].measured == pytest.approx(float(sigma[95]), rel=1e-2)


@pytest.mark.slow
def test_a_gap_above_its_bound_is_refuted_and_one_that_rounding_explains_is_not(run, one_hot_digits):
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified")
    run(guard, one_hot_digits)
    entry = guard.history[-2]
    honest = entry["head_gap"], entry["head_gap_lower"]
    assert entry["bound"] < entry["bound_rounded"] < 1.2 * entry["bound"]
    for gap, verdict in (
        (2 * entry["bound_rounded"], "refuted"),
        ((entry["bound"] + entry["bound_rounded"]) / 2, "undecided"),
        (honest[0], "consistent"),
    ):
        entry["head_gap"] = entry["head_gap_lower"] = gap
        judged = {each.name: each for each in phase_two_criteria(guard)}["head_bound"]
        assert judged.verdict == verdict, judged
    entry["head_gap"], entry["head_gap_lower"] = 2 * entry["bound_rounded"], honest[1]
    assert {each.name: each.verdict for each in phase_two_criteria(guard)}["head_bound"] == "undecided"


@pytest.mark.slow
def test_a_float32_run_that_outlives_its_bound_is_not_refuted(make_trainer, make_regression):
    """Well-conditioned features: the linear bound falls below what float32 weights can reach."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    data = torch.utils.data.TensorDataset(6 * torch.eye(6), torch.randn(6, 2))
    guard, criteria = (
        ExpressivityGuard(switch_at=2, step_rule="certified"), ConvergenceCriteria("kawaguchi_sun", every_n_steps=50)
    )  # fmt: skip
    make_trainer([guard, criteria], max_epochs=250).fit(make_regression(network, lr=1e-3), DataLoader(data, 6))
    last = guard.history[-1]
    assert last["gap"] > 10 * last["bound"]
    assert last["head_gap_lower"] <= last["bound_rounded"]
    judged = found(criteria)["head_bound"]
    assert judged.verdict == "undecided"
    assert "which the rounding of the steps explains" in judged.reason


OPTIMIZERS = {
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), 96, r"SGD with momentum=0.9"),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), 96, "the optimizer is Adam"),
    "mini-batches": (lambda p: torch.optim.SGD(p, lr=0.001), 32, "mini-batches, whose bounds hold in expectation"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_that_no_bound_covers_are_said_and_the_gap_is_told(run, one_hot_digits, name):
    optimizer, batch_size, said = OPTIMIZERS[name]
    guard = ExpressivityGuard(switch_at=SWITCH)
    criteria, _, _ = run(guard, one_hot_digits, optimizer=optimizer, batch_size=batch_size, epochs=8)
    seen = found(criteria)
    for each in (seen["head_step"], seen["head_bound"]):
        assert each.verdict == "not applicable"
        assert said in each.reason
    assert seen["head_bound"].measured == guard.history[-1]["gap"]
    assert seen["phase_two_infimum"].verdict == "consistent"


@pytest.mark.slow
def test_mini_batches_of_certified_size_solved_heads_and_rounded_steps_have_no_bound_either(run, one_hot_digits):
    cases = (
        ({"step_rule": "certified"}, {"batch_size": 32}, "mini-batches"),
        ({"step_rule": "solve"}, {}, "solved at the switch"),
        ({"step_rule": "certified"}, {"precision": "bf16-mixed"}, "bf16"),
    )
    for settings, options, said in cases:
        guard = ExpressivityGuard(switch_at=SWITCH, **settings)
        criteria, _, _ = run(guard, one_hot_digits, epochs=8, **options)
        assert guard.phase == 2
        seen = found(criteria)
        assert {seen[name].verdict for name in ("head_step", "head_bound")} == {"not applicable"}, said
        assert said in seen["head_bound"].reason


def test_without_a_guard_before_the_switch_and_where_it_declined(run, one_hot_digits):
    criteria, _, _ = run(None, one_hot_digits, epochs=1)
    assert {each.verdict for each in found(criteria).values()} == {"not applicable"}
    assert {each.reason for each in found(criteria).values()} == {"the run has no ExpressivityGuard"}
    criteria, _, _ = run(ExpressivityGuard(switch_at=3), one_hot_digits, epochs=2)
    assert {each.verdict for each in found(criteria).values()} == {"undecided"}
    assert all("phase 2 has not begun" in each.reason for each in found(criteria).values())
    inputs, targets = (torch.cat([tensor, tensor]) for tensor in one_hot_digits.tensors)
    guard = ExpressivityGuard(switch_at=1)
    with pytest.warns(UserWarning, match="without the guarantee"):
        criteria, _, _ = run(guard, torch.utils.data.TensorDataset(inputs, targets), batch_size=192, epochs=3)
    assert {each.verdict for each in found(criteria).values()} == {"not applicable"}
    assert all("phase 2 was not entered" in each.reason for each in found(criteria).values())


@pytest.mark.slow
def test_what_limits_the_guard_limits_the_criteria(run, one_hot_digits):
    class Meddler(pl.Callback):
        """Moves the trunk after the last measurement of the criteria."""

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == trainer.max_epochs - 1:
                with torch.no_grad():
                    pl_module.trunk[0].weight.mul_(1.5)

    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="certified")
    with pytest.warns(UserWarning, match="the trunk moved"):
        criteria, _, _ = run(guard, one_hot_digits, epochs=8, callbacks=[Meddler()])
    assert found(criteria)["phase_two_infimum"].verdict == "undecided"
    assert "the trunk moved" in found(criteria)["phase_two_infimum"].reason
    assert found(criteria)["head_bound"].verdict == "not applicable"
    decayed = ExpressivityGuard(switch_at=SWITCH)
    criteria, _, _ = run(
        decayed, one_hot_digits, epochs=8, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1)
    )
    assert "weight decay" in found(criteria)["head_bound"].reason
    assert "weight decay" in found(criteria)["phase_two_infimum"].reason
    assert found(criteria)["phase_two_infimum"].verdict == "undecided"


@pytest.mark.slow
@pytest.mark.parametrize("moved", [True, False])
def test_the_report_has_what_the_guard_finds_out_at_the_end_wherever_it_stands_in_the_list(
    tmp_path, make_trainer, make_module, one_hot_digits, moved
):
    class Meddler(pl.Callback):
        """Moves the trunk after the last measurement of the criteria."""

        def on_train_end(self, trainer, pl_module):
            if moved:
                with torch.no_grad():
                    pl_module.trunk[0].weight.mul_(1.5)

    module = make_module(dropout=0.0)
    module.loss_fn = nn.MSELoss()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    criteria, guard = (
        ConvergenceCriteria("kawaguchi_sun", probe=16, every_n_steps=3),
        ExpressivityGuard(switch_at=SWITCH, step_rule="certified"),
    )
    report = ConvergenceReport(folder=str(tmp_path))
    order = [report, criteria, Meddler(), guard]
    warns = pytest.warns(UserWarning, match="the trunk moved") if moved else contextlib.nullcontext()
    with warns:
        make_trainer(order, max_epochs=8).fit(module, DataLoader(one_hot_digits, 96))
    stored = json.loads((tmp_path / "convergence.json").read_text())
    written = {each["name"]: (each["verdict"], each["reason"]) for each in stored["criteria"]}
    assert written == {each.name: (each.verdict, each.reason) for each in criteria.criteria}
    verdict, reason = written["phase_two_infimum"]
    assert (verdict == "undecided") == moved
    assert ("the trunk moved" in reason) == moved
    assert stored["metrics"]["theory/refuted"] == criteria.metrics["theory/refuted"]
    last = list(criteria.criteria)
    criteria.finish(None)  # after the run there is nothing to judge again
    assert criteria.criteria == last


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["certified", "base"])
def test_a_resumed_run_judges_the_whole_of_phase_two(tmp_path, run, one_hot_digits, rule):
    plain = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.02)}

    def guard():
        return ExpressivityGuard(switch_at=SWITCH, step_rule=rule)

    whole, _, _ = run(guard(), one_hot_digits, epochs=12, **plain)
    run(guard(), one_hot_digits, epochs=7, checkpoint=True, **plain)
    path = tmp_path / "checkpoints" / "last.ckpt"
    torch.load(path, weights_only=True)
    resumed, _, _ = run(guard(), one_hot_digits, epochs=12, seed=5, fit={"ckpt_path": path}, **plain)
    assert found(resumed) == found(whole)
    assert found(whole)["head_bound"].verdict == "consistent"
