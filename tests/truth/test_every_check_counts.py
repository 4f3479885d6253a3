"""Every check of the guard's claim is needed: for each there is a run that would be certified if that one were ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from adversary import Case
from kind_hooks import PUT, callback
from kind_trunks import COUPLINGS, Through
from runs import Run, fit, plain

from lightning_conv.callbacks.guard import state as guard_state
from lightning_conv.callbacks.guard.certify import checks as guard_checks
from lightning_conv.callbacks.guard.certify.checks import NEEDED

CASE = Case("every check", "", loss="mse")


def follows(case: Case) -> Run:
    run = plain(case, forward=lambda net, x: net.head(net.trunk(x)) * 0.5 + 0.1)
    run.guard = {"head": "head"}
    return run


def unequal_draws(case: Case) -> Run:
    return plain(case, trainer={"limit_train_batches": 1})


def random_inputs(case: Case) -> Run:
    return plain(case)


def decayed(case: Case) -> Run:
    run = plain(case)
    run.module.optimizer = {"lr": 0.01, "weight_decay": 0.01}
    return run


def another_loss(case: Case) -> Run:
    return plain(case, step=lambda net, b: net.loss_fn(net(b[0]) * 1.5, b[1]))


def later(case: Case) -> Run:
    return plain(
        case, step=lambda net, b: net.loss_fn(net(b[0]), b[1]) * (1.0 if net.current_epoch < 9 else 2.0), epochs=10
    )


def gradients(case: Case) -> Run:
    run = plain(case)
    PUT["on_after_backward"](run)
    return run


def coupled(case: Case) -> Run:
    return plain(case, Through(case, COUPLINGS["the sample before"]))


def moved_at_the_end(case: Case) -> Run:
    run = plain(case)
    PUT["on_train_batch_end that decays"](run)
    return run


def wrong_infimum(case: Case) -> Run:
    return plain(case, guard={"infimum": 1e6})


def moved_by_hand(case: Case) -> Run:
    """Move the trunk after the last step, in which nothing can be seen of it."""

    def move(self: Any, trainer: Any, net: Any) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1:
            net.trunk[0].weight.data.mul_(0.99)

    run = plain(case)
    callback("on_train_epoch_end", move)(run)
    return run


def moved_head(case: Case) -> Run:
    run = plain(case)
    PUT["optimizer_step that decays"](run)
    return run


# What is set up for each check, and the rule.
RUNS: dict[str, tuple[Callable[[Case], Run], str]] = {
    "head probed": (plain, "base"),
    "nothing follows the head": (follows, "base"),
    "every sample alike": (unequal_draws, "base"),
    "fixed inputs": (random_inputs, "base"),
    "no other term in the optimizer": (decayed, "base"),
    "full precision": (plain, "base"),
    "compared with the step": (another_loss, "base"),
    "same loss to the end": (later, "solve"),  # the run ends before it changes
    "gradients of the step": (gradients, "base"),
    "same features in the step": (coupled, "base"),
    "own loss": (moved_at_the_end, "solve"),
    "no narrow cast": (plain, "base"),
    "at these weights": (plain, "base"),
    "steps of the rule": (moved_head, "base"),
    "given infimum": (wrong_infimum, "base"),
    "trunk unmoved": (moved_by_hand, "base"),
}


def special(name: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Arrange what a module cannot: that a check says no, though nothing of the kind is in the run."""
    if name == "every sample alike":
        return Case("every check", name, loss="mse", batch=5)
    if name == "full precision":
        return Case("every check", name, loss="mse", precision="bf16-mixed")
    if name == "head probed":
        from lightning_conv.networks import head

        made = head.Head
        monkeypatch.setattr(head, "Head", lambda *args, **kwargs: made(*args, **kwargs | {"probed": False}))
    if name == "fixed inputs":
        from lightning_conv.callbacks.run.data.training_set import TrainingSet

        monkeypatch.setattr(TrainingSet, "is_random", lambda self: True)
    return CASE


def verdict_without(name: str | None, states: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Judge the state of a run again, with one check taken for made and held."""
    if name is not None:
        monkeypatch.setattr(guard_checks, "NEEDED", tuple(each for each in NEEDED if each != name))
    settle = guard_checks.settle

    def ignoring(verdict: Any, why: str, found: Any) -> Any:
        return settle(verdict, why, [each for each in found if each.name != name])

    monkeypatch.setattr(guard_state, "settle", ignoring)
    monkeypatch.setattr(
        guard_state, "caveats", lambda found: guard_checks.caveats([each for each in found if each.name != name])
    )
    states.judge()
    monkeypatch.undo()
    return states.verdict, states.why


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_with_a_check_a_run_is_undecided_that_would_be_certified_without_it(name, monkeypatch):
    build, rule = RUNS[name]
    case = special(name, monkeypatch)
    run = fit(Case(**{**vars(case), "rule": rule}), build)
    monkeypatch.undo()
    assert not isinstance(run, str), run
    state = run.seen._state
    if name == "at these weights":  # what `distinct` says where the rows were not looked at
        state.certificate = replace(state.certificate, method="distinct", rows_here=0)
    if name == "no narrow cast":  # of a certificate that does not withdraw itself for one
        state.certificate = replace(state.certificate, narrow="somewhere in float32")
    failed = {check.name for check in run.seen.checks if not check.held}
    assert verdict_without(None, state, monkeypatch)[0] == "undecided"
    verdict, why = verdict_without(name, state, monkeypatch)
    assert verdict == "certified", (failed, why, state.caveats)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_a_check_that_was_not_made_leaves_an_honest_run_undecided(name, monkeypatch):
    run = fit(CASE, plain)
    assert not isinstance(run, str)
    assert run.seen.verdict == "certified"
    state = run.seen._state
    state.checks = [check for check in state.checks if check.name != name]
    if name in {check.name for check in guard_checks.of_certificate(state.certificate)}:
        of = guard_checks.of_certificate
        monkeypatch.setattr(guard_state, "of_certificate", lambda found: [c for c in of(found) if c.name != name])
    state.judge()
    assert state.verdict == "undecided"
    assert name in state.why
