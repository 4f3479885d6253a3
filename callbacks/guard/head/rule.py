"""``HeadRule``: the step rule of the head in phase 2 is set up, given up, and judged by what it proves."""

from __future__ import annotations

import math

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_conv.callbacks.guard.certify.claim import Claim
from lightning_conv.callbacks.guard.certify.run_checks import optimizer_check
from lightning_conv.callbacks.guard.certify.trunk_rounding import PLACES, roundings
from lightning_conv.callbacks.guard.certify.verdict import SEPARATED, HeadBounds, where_attained
from lightning_conv.callbacks.guard.head.certified_steps import CertifiedSteps
from lightning_conv.callbacks.guard.head.curvature import beyond, known_curvature
from lightning_conv.callbacks.guard.head.plain_steps import describe_head_steps, watched_steps
from lightning_conv.callbacks.guard.head.problem import TrainedHead
from lightning_conv.callbacks.guard.head.solved import SolvedHead, is_solved, memory_of, solve_and_write, solve_on
from lightning_conv.callbacks.guard.head.steps import HeadSteps
from lightning_conv.callbacks.guard.settings import GuardSettings, StepRule
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.trunk_rows import TrunkRows
from lightning_conv.callbacks.run.guarded import attempted, guarded
from lightning_conv.callbacks.run.logging import publish
from lightning_conv.last_layer import HeadProblem, HeadSolution

# Errors of data, a loss or features that the convex problem of the head cannot take, on any rank.
FROM_DATA = (ArithmeticError, MemoryError, MisconfigurationException, RuntimeError, TypeError, ValueError)


class HeadRule:
    """The rule by which the head is trained: the requested one, or the run's own optimizer after it failed.

    Args:
        view: Run, with its network split into trunk and head.
        settings: Settings of the guard.
        state: State of the guard, updated in place.
        claim: The guard's claim, which what fails here limits.

    Attributes:
        steps: The steps of the rule in force.
    """

    def __init__(self, view: GuardView, settings: GuardSettings, state: GuardState, claim: Claim) -> None:
        self._view, self._settings, self._state, self._claim = view, settings, state, claim
        self.steps = HeadSteps(view)
        claim.give_up = lambda why: self.steps.give_up(why)

    @property
    def name(self) -> StepRule:
        """The step rule in force: the requested one, or ``"base"`` after it failed."""
        memory, asked = self._state.steps, self._settings.step_rule
        return "base" if memory.get("rule") == "base" and memory.get("asked") == asked else asked

    @property
    def is_solved(self) -> bool:
        """Whether the head is solved and constant."""
        return isinstance(self.steps, SolvedHead)

    @property
    def is_bare(self) -> bool:
        """Whether the run's own optimizer moves the head and nothing is followed."""
        return type(self.steps) is HeadSteps

    def set_up(self) -> None:
        """Set the rule up, at the switch or when a run resumes in phase 2; fall back to the run's optimizer where that fails."""
        self._forget_other_rules()
        if self.name != "base" and self._claim.other_loss:
            self.tell_of_another_loss()
        if self.name != "base":
            with attempted(*FROM_DATA) as setting_up:
                self._set_up_rule()
            if setting_up.failed:
                self._claim.limit(
                    "steps of the rule", f"step_rule={self.name!r} could not be set up ({setting_up.reason})"
                )
                self._fall_back()

    def _forget_other_rules(self) -> None:
        """Clear the state of the step rule if another rule was in force since: its counts are of the steps since its own start."""
        state, asked = self._state, self._settings.step_rule
        if not state.steps or (state.steps["rule"] == self.name and state.steps.get("asked", self.name) == asked):
            return
        if state.steps.get("asked", state.steps["rule"]) != asked:
            state.add_reason(f"resumed with step_rule={asked!r}")
        state.steps = {}

    def _set_up_rule(self) -> None:
        view, state, tol = self._view, self._state, self._settings.tol
        head = TrainedHead(view)
        if self.name == "certified":
            self.steps = CertifiedSteps(view, head, state.steps, state.certificate)
            self._withdraw_where_narrow(head)
            return
        if not state.steps:
            solution = solve_and_write(head, view.ranks, tol)
            if not is_solved(solution, tol):
                self._judge_by(head.problem, solution)
                said = f"the last layer could not be solved by {solution.method}: {solution.reason}; the run goes on by its own optimizer"
                self._tell(said, "step_rule='solve': ")
                self._fall_back()
                return
            state.steps |= memory_of(solution)
            state.add_reason(state.steps["reason"])
            self._judge_by(head.problem, solution)
        self.steps = SolvedHead(view, head, state.steps)
        self._withdraw_where_narrow(head)
        view.trainer.should_stop = True

    def _withdraw_where_narrow(self, head: TrainedHead) -> None:
        if head.narrow:
            self.steps.give_up(head.narrow)

    def follow_plain_steps(self) -> None:
        """Bound the gap of the run's own steps, where they are plain full-batch gradient descent."""
        found = watched_steps(self._view, self._state)
        if isinstance(found, str):
            self._state.steps = {"rule": "base", "asked": "base", "no_bound": found}
        else:
            self.steps = found

    def note_curvature(self) -> None:
        """Record L_H where it is known, and warn if the learning rate of plain SGD is above 2 / L_H."""
        view, state = self._view, self._state
        with guarded(None, "ExpressivityGuard: no curvature of the head's loss", expects=FROM_DATA) as attempt:
            state.curvature = view.ranks.broadcast(known_curvature(state.steps, state.certificate, view))
        if attempt.failed or state.curvature is None or self.name != "base":
            return
        rate = describe_head_steps(view.trainer.optimizers[0], view.head).rate
        if said := beyond(rate, state.curvature):
            self._tell(said)

    def _tell(self, said: str, about: str = "") -> None:
        self._state.add_reason(said)
        rank_zero_warn(f"ExpressivityGuard: {about}{said}")

    def tell_of_another_loss(self) -> None:
        """Say that the rule is for another loss than that of the training step, and fall back to the run's optimizer."""
        self._tell(f"step_rule={self.name!r} is for that loss, so the optimizer of the run goes on, and no bound holds")
        self._fall_back()

    def _fall_back(self) -> None:
        """Fall back to the run's optimizer, withdraw the bound, and add the optimizer's caveats."""
        self._state.steps = {"rule": "base", "asked": self._settings.step_rule}
        self.steps = HeadSteps(self._view)
        self.withdraw_logged_bound()
        for check in optimizer_check(self._view):
            self._claim.take(check)

    def withdraw_logged_bound(self) -> None:
        """Let ``guard/bound`` be infinite in ``callback_metrics``, if it was logged."""
        if "guard/bound" in self._view.trainer.callback_metrics:
            publish(self._view.trainer, {"guard/bound": math.inf})

    def note_best_loss(self) -> None:
        """Compute bounds of the smallest loss that the head can reach on this trunk, and append them to the reason."""
        view, state = self._view, self._state
        if self._settings.step_rule == "solve" or view.loss.loss_fn is None or not view.head.last:
            return
        with attempted(*FROM_DATA) as attempt:
            head = TrainedHead(view)
            found = solve_on(head, view.ranks, self._settings.tol)
        if attempt.failed:
            state.add_reason(f"the best loss of this trunk is not known ({attempt.reason})")
            return
        dual, least = found.head_infimum, ""
        state.best_loss = found.loss.value
        if dual is not None and not math.isinf(dual.lower):
            # The lower bound may cover only heads within this radius.
            about = f" (heads with |W|_F <= {dual.radius:.3g})" if math.isfinite(dual.radius) else ""
            least = f"at least {dual.lower:.6g}{about} and "
        state.add_reason(f"the best loss of this trunk is {least}at most {found.loss.upper:.6g}")
        self._judge_by(head.problem, found)

    def _judge_by(self, problem: HeadProblem, solution: HeadSolution) -> None:
        """Update the verdict with the bounds from the solved head problem."""
        view, state = self._view, self._state
        state.loss_kind = where_attained(view.loss.kind, problem.losses.targets)
        exact, apart = roundings(view, TrunkRows.of(view.data, view.network, view.head, torch.float64))
        # The steps see the run's own features, and not those of the float64 copy.
        error = exact if view.head.module.weight.dtype == torch.float64 else PLACES * apart
        state.bounds = HeadBounds.of(problem, solution, state.loss_kind, error)
        before = state.verdict, state.why
        state.judge()
        if state.verdict == "certified" and before[0] != "certified":
            state.add_reason(SEPARATED)
        elif state.why and state.why != before[1]:
            state.add_reason(state.why)
