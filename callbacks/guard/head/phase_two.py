"""Phase 2 of a guarded run: the trunk is frozen, its features are cached, the head is trained by its rule, the loss is measured."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.checks import CheckName
from lightning_conv.callbacks.guard.certify.claim import Claim
from lightning_conv.callbacks.guard.certify.move_watch import MoveWatch
from lightning_conv.callbacks.guard.certify.run_checks import optimizer_caveats
from lightning_conv.callbacks.guard.certify.verdict import SEPARATED, HeadBounds, where_attained
from lightning_conv.callbacks.guard.head.cached_outputs import CachedOutputs
from lightning_conv.callbacks.guard.head.certified_steps import CertifiedSteps
from lightning_conv.callbacks.guard.head.curvature import beyond, known_curvature
from lightning_conv.callbacks.guard.head.feature_cache import FeatureCache, NotCachedError
from lightning_conv.callbacks.guard.head.loss_check import LossCheck
from lightning_conv.callbacks.guard.head.plain_steps import describe_head_steps, watched_steps
from lightning_conv.callbacks.guard.head.problem import TrainedHead
from lightning_conv.callbacks.guard.head.solved import SolvedHead, is_solved, memory_of, solve_and_write, solve_on
from lightning_conv.callbacks.guard.head.steps import HeadSteps
from lightning_conv.callbacks.guard.head.trunk import FrozenTrunk
from lightning_conv.callbacks.guard.settings import GuardSettings, StepRule
from lightning_conv.callbacks.guard.state import MEASURED, GuardState
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted, guarded
from lightning_conv.callbacks.run.logging import publish, withdraw
from lightning_conv.last_layer import HeadProblem, HeadSolution

# Errors of data, a loss or features that the convex problem of the head cannot take, on any rank.
FROM_DATA = (ArithmeticError, MemoryError, MisconfigurationException, RuntimeError, TypeError, ValueError)


class PhaseTwo:
    """Phase 2 of one run: freezes the trunk, caches features, and applies the step rule.

    Args:
        view: Run, with its network split into trunk and head.
        settings: Settings of the guard.
        state: State of the guard, updated in place.
    """

    def __init__(self, view: GuardView, settings: GuardSettings, state: GuardState) -> None:
        self._view, self._settings, self._state = view, settings, state
        self.trunk = FrozenTrunk(view)
        self._cache: FeatureCache | None = None
        self._steps = HeadSteps(view)
        self._check = LossCheck(view, settings.input_fn)
        self.claim = Claim(view, state)
        self._moves = MoveWatch(view.head.module, view.ranks)
        self._said: tuple[int, float] | None = None  # step and loss of the last measurement

    @property
    def rule(self) -> StepRule:
        """Step rule in force: the requested one, or ``"base"`` after it failed."""
        memory, asked = self._state.steps, self._settings.step_rule
        return "base" if memory.get("rule") == "base" and memory.get("asked") == asked else asked

    def begin(self) -> None:
        """Freeze the trunk, and set up the step rule of the head, at the switch or when a run resumes in phase 2."""
        self.trunk.freeze()
        self._forget_other_rules()
        self.claim.gradients.again()
        if self.claim.other_loss:
            self._check.end()
            if self.rule != "base":
                self._tell_of_another_loss()
        if self.rule != "base":
            with attempted(*FROM_DATA) as setting_up:
                self._set_up_rule()
            if setting_up.failed:
                self.limit("steps of the rule", f"step_rule={self.rule!r} could not be set up ({setting_up.reason})")
                self._fall_back()
        if self._settings.cache_features and not isinstance(self._steps, SolvedHead):
            expects = (MemoryError, NotCachedError, RuntimeError)
            with attempted(*expects) as caching:
                self._cache = FeatureCache(self._view)
                self._cache_outputs(self._cache)
            if caching.error is not None:
                self._drop_cache(str(caching.error))
        # Only now: the user asked for the cache and not for this bound, whose float64 features take the memory that is left.
        if self._settings.step_rule == "base":
            self._watch_plain_steps()

    def _forget_other_rules(self) -> None:
        """Clear the state of the step rule if another rule was in force since: its counts are of the steps since its own start."""
        state, asked = self._state, self._settings.step_rule
        if not state.steps or (state.steps["rule"] == self.rule and state.steps.get("asked", self.rule) == asked):
            return
        if state.steps.get("asked", state.steps["rule"]) != asked:
            state.add_reason(f"resumed with step_rule={asked!r}")
        state.steps = {}

    def _cache_outputs(self, cache: FeatureCache) -> None:
        """Evaluate the training loss on the cached features, if nothing follows the head."""
        if not self._view.head.last:  # its output is then not the network's output
            return
        try:
            self._view.loss.cached_outputs = CachedOutputs(self._view, cache)
        except MemoryError as error:
            rank_zero_warn(
                f"ExpressivityGuard: cache_features: the loss on the training set is measured without: {error}"
            )

    def _set_up_rule(self) -> None:
        view, state, tol = self._view, self._state, self._settings.tol
        head = TrainedHead(view)
        if self.rule == "certified":
            self._steps = CertifiedSteps(view, head, state.steps, state.certificate)
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
        self._steps = SolvedHead(view, head, state.steps)
        view.trainer.should_stop = True

    def _watch_plain_steps(self) -> None:
        """Bound the gap of the run's own steps, where they are plain full-batch gradient descent."""
        found = watched_steps(self._view, self._state)
        if isinstance(found, str):
            self._state.steps = {"rule": "base", "asked": "base", "no_bound": found}
        else:
            self._steps = found

    def note_curvature(self) -> None:
        """Record L_H where it is known, and warn if the learning rate of plain SGD is above 2 / L_H."""
        view, state = self._view, self._state
        with guarded(None, "ExpressivityGuard: no curvature of the head's loss", expects=FROM_DATA) as attempt:
            state.curvature = view.ranks.broadcast(known_curvature(state.steps, state.certificate, view))
        if attempt.failed or state.curvature is None or self.rule != "base":
            return
        rate = describe_head_steps(view.trainer.optimizers[0], view.head).rate
        if said := beyond(rate, state.curvature):
            self._tell(said)

    def _tell(self, said: str, about: str = "") -> None:
        self._state.add_reason(said)
        rank_zero_warn(f"ExpressivityGuard: {about}{said}")

    def _tell_of_another_loss(self) -> None:
        self._tell(f"step_rule={self.rule!r} is for that loss, so the optimizer of the run goes on, and no bound holds")
        self._fall_back()

    def _fall_back(self) -> None:
        """Fall back to the run's optimizer, withdraw the bound, and add the optimizer's caveats."""
        self._state.steps = {"rule": "base", "asked": self._settings.step_rule}
        self._steps = HeadSteps(self._view)
        self._withdraw_logged_bound()
        for caveat in optimizer_caveats(self._view.trainer, self._view.head):
            self.limit("no other term in the optimizer", caveat)

    def _withdraw_logged_bound(self) -> None:
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
        state = self._state
        state.loss_kind = where_attained(self._view.loss.kind, problem.losses.targets)
        state.bounds = HeadBounds.of(problem, solution, state.loss_kind)
        before = state.verdict, state.why
        state.judge()
        if state.verdict == "certified" and before[0] != "certified":
            state.add_reason(SEPARATED)
        elif state.why and state.why != before[1]:
            state.add_reason(state.why)

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep the module in eval mode, and prepare the comparisons of the loss in the first batch of an epoch, and of gradients.

        Args:
            batch: The batch that the training step is about to see.
            batch_idx: Its number in the epoch.
        """
        self.trunk.keep_still()
        if moved := self._moves.before_batch():
            self.limit("steps of the rule", moved)
        if not isinstance(self._steps, SolvedHead):
            with self._cache.suspended() if self._cache is not None else nullcontext():
                self.claim.gradients.before_batch(batch, batch_idx)
        self._check.before(batch)

    def before_step(self, optimizer: Optimizer) -> None:
        """Call the step rule between the backward pass and the optimizer step.

        Args:
            optimizer: Optimizer that is about to step.
        """
        self.claim.gradients.before_step()
        self._steps.before_step(optimizer)
        self._moves.before_step(optimizer)

    def after_batch(self, loss: Tensor | None) -> None:
        """Check the step, the cache and the loss of a batch; add a caveat or fall back to the run's optimizer if a check fails.

        Args:
            loss: Loss that the training step returned; None: not known.
        """
        stepped = self._steps.after_step() or self._moves.after_batch() or None
        if self._cache is not None and (why := self._cache.give_up()) is not None:
            self._drop_cache(why)
        if (said := self._check.after(loss)) is not None:
            self.limit("compared with the step", said)
            if self.rule != "base":
                # The rule minimises ``loss_fn``, which is not the loss of the training step.
                self._check.take_back()
                self._tell_of_another_loss()
        elif stepped is not None:  # a wrong gradient follows from a wrong loss, so only one of the two is reported
            self.limit("steps of the rule", stepped)
        else:
            self.claim.take_gradients()

    def limit(self, name: CheckName, caveat: str) -> None:
        """Add a caveat found during the run, withdraw what was proven of the steps, and judge again.

        Args:
            name: Name of the check that failed.
            caveat: Reason why the guarantee is limited.
        """
        if self.claim.limit(name, caveat):
            self._steps.give_up(caveat)

    def measure(self) -> None:
        """Append loss, gap and bound to the history, and schedule a comparison of the loss on the next batch."""
        self._check.again()
        trainer = self._view.trainer
        step, epoch = trainer.global_step, trainer.current_epoch
        with guarded(step, "ExpressivityGuard: no training loss", expects=FROM_DATA) as attempt:
            measured = self._steps.measure()
        if attempt.failed:
            tags = {"convergence/gap", *(f"guard/{name}" for name in MEASURED)}
            withdraw(trainer, tags & trainer.callback_metrics.keys())
            return
        if "bound" not in measured:
            self._withdraw_logged_bound()
        if measured := self._view.ranks.broadcast(measured):
            self._state.history.append({"step": float(step), "epoch": float(epoch)} | measured)
            self._said = step, measured["loss"]
            self._require_infimum(measured)

    def _require_infimum(self, measured: dict[str, float]) -> None:
        """Withdraw the verdict if the loss is below the infimum that the user gave, by more than float32 rounding explains."""
        loss, gap = measured["loss"], measured.get("gap", 0.0)
        if gap < -1e-5 * max(abs(loss), abs(loss - gap)):
            self.limit(
                "given infimum",
                f"infimum: {loss - gap:.6g} is above the loss {loss:.6g}, so it is not the infimum of this loss",
            )

    def end(self) -> None:
        """Check that the trunk is unchanged, and that the network's own loss is the one that was said of these weights."""
        self.warn_if_moved()
        self.compare_own_loss()

    def compare_own_loss(self) -> None:
        """Call the network on the training set, and compare its loss with the last one that was measured, if that is of now."""
        said = self._said[1] if self._said is not None and self._said[0] == self._view.trainer.global_step else None
        measured = type(self._steps) is HeadSteps and self._view.loss.cached_outputs is None  # by calling the network
        self.claim.compare_own_loss(None if measured else said)

    def warn_if_moved(self) -> None:
        """Compare the trunk with its fingerprints from the switch; if it moved, withdraw the verdict and warn."""
        state = self._state
        if moved := self.trunk.moved_since(state.fingerprints):
            said = f"the trunk moved during phase 2 ({', '.join(moved)}), so the guarantee no longer applies"
            if state.steps:
                state.steps.setdefault("given_up", said)
            self.claim.withdraw(said)

    def _drop_cache(self, why: str) -> None:
        self._release_cache()
        rank_zero_warn(f"ExpressivityGuard: cache_features: phase 2 goes on without cached features: {why}")

    def _release_cache(self) -> None:
        if self._cache is not None:
            self._cache.release()
        self._cache = self._view.loss.cached_outputs = None

    def release(self) -> None:
        """Restore the module to its state before phase 2: its forward functions, ``requires_grad`` and modes."""
        self._release_cache()
        self._check.release()
        self.trunk.release()
