"""Phase 2 of a guarded run: the trunk is frozen, its features are cached, the head is trained by its rule, the loss is measured."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.checks import Check
from lightning_conv.callbacks.guard.certify.claim import Claim
from lightning_conv.callbacks.guard.certify.no_effect import without_effect
from lightning_conv.callbacks.guard.certify.run_checks import optimizer_check
from lightning_conv.callbacks.guard.head.cached_outputs import CachedOutputs
from lightning_conv.callbacks.guard.head.feature_cache import FeatureCache, NotCachedError
from lightning_conv.callbacks.guard.head.loss_check import LossCheck
from lightning_conv.callbacks.guard.head.rule import FROM_DATA, HeadRule
from lightning_conv.callbacks.guard.head.trunk import FrozenTrunk
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import MEASURED, GuardState
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted, guarded
from lightning_conv.callbacks.run.logging import withdraw


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
        self._check = LossCheck(view)
        self.claim = Claim(view, state)
        self.rule = HeadRule(view, settings, state, self.claim)
        self.claim.head.move_head = lambda: self.rule.steps.move_head()
        self._said: tuple[int, float] | None = None  # step and loss of the last measurement

    def begin(self) -> None:
        """Freeze the trunk, and set up the step rule of the head, at the switch or when a run resumes in phase 2."""
        self.trunk.freeze()
        self.claim.gradients.again()
        self.claim.head.moved_on_purpose()
        if self.claim.other_loss:
            self._check.end()
        self.rule.set_up()
        if self._settings.cache_features and not self.rule.is_solved:
            expects = (MemoryError, NotCachedError, RuntimeError)
            with attempted(*expects) as caching:
                self._cache = FeatureCache(self._view)
                self._cache_outputs(self._cache)
            if caching.error is not None:
                self._drop_cache(str(caching.error))
        # Only now: the user asked for the cache and not for this bound, whose float64 features take the memory that is left.
        if self._settings.step_rule == "base":
            self.rule.follow_plain_steps()

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

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep the module in eval mode, and prepare the comparisons of the loss in the first batch of an epoch, and of gradients.

        Args:
            batch: The batch that the training step is about to see.
            batch_idx: Its number in the epoch.
        """
        self.trunk.keep_still()
        if not self.rule.is_solved:
            with self._cache.suspended() if self._cache is not None else nullcontext():
                self.claim.before_batch(batch, batch_idx)
        self._check.before(batch)

    def after_backward(self) -> None:
        """Look at no calls of the head until the next training step."""
        self.claim.head.calls.after_backward()
        self._check.after_backward()

    def before_step(self, optimizer: Optimizer) -> None:
        """Call the step rule between the backward pass and the optimizer step.

        Args:
            optimizer: Optimizer that is about to step.
        """
        if self.claim.gradients.follows:
            self.warn_if_moved()  # where the step is made: something may move the trunk for the time of a step
        self.claim.before_step()
        self.rule.steps.before_step(optimizer)
        self.claim.hold_head()

    def after_batch(self, loss: Tensor | None) -> None:
        """Check the step, the cache and the loss of a batch; add a caveat or fall back to the run's optimizer if a check fails.

        Args:
            loss: Loss that the training step returned; None: not known.
        """
        self.claim.after_batch()
        stepped = self.rule.steps.after_step()
        if self._cache is not None and (why := self._cache.give_up()) is not None:
            self._drop_cache(why)
        said = self._check.after(loss)
        if self._check.unseen and self.claim.holds("compared with the step"):
            self.claim.limit("compared with the step", self._check.unseen)
        if said is not None:
            self.claim.limit("compared with the step", said)
            if self.rule.name != "base":
                # The rule minimises ``loss_fn``, which is not the loss of the training step.
                self._check.take_back()
                self.claim.head.moved_on_purpose()
                self.rule.tell_of_another_loss()
        elif stepped is not None:  # a wrong gradient follows from a wrong loss, so only one of the two is reported
            self.claim.limit("steps of the rule", stepped)
        else:
            self.claim.take_steps()

    def measure(self) -> None:
        """Append loss, gap and bound to the history, and schedule a comparison of the loss on the next batch."""
        self._check.again()
        self.claim.compare_features()
        if not self.rule.is_solved:
            self.claim.compare_loss()
        trainer = self._view.trainer
        step, epoch = trainer.global_step, trainer.current_epoch
        with guarded(step, "ExpressivityGuard: no training loss", expects=FROM_DATA) as attempt:
            measured = self.rule.steps.measure()
        if attempt.failed:
            tags = {"convergence/gap", *(f"guard/{name}" for name in MEASURED)}
            withdraw(trainer, tags & trainer.callback_metrics.keys())
            return
        if "bound" not in measured:
            self.rule.withdraw_logged_bound()
        if measured := self._view.ranks.broadcast(measured):
            self._state.history.append({"step": float(step), "epoch": float(epoch)} | measured)
            self._said = step, measured["loss"]
            self._require_infimum(measured)
            self._require_bound(measured)
        if not self.rule.is_solved and self.rule.name == "base":
            self.claim.take_all(optimizer_check(self._view))  # its settings may have changed

    def _require_infimum(self, measured: dict[str, float]) -> None:
        """Withdraw the verdict if the loss is below the infimum that the user gave, by more than float32 rounding explains."""
        loss, gap = measured["loss"], measured.get("gap", 0.0)
        if gap < -1e-5 * max(abs(loss), abs(loss - gap)):
            self.claim.limit(
                "given infimum",
                f"infimum: {loss - gap:.6g} is above the loss {loss:.6g}, so it is not the infimum of this loss",
            )

    def _require_bound(self, measured: dict[str, float]) -> None:
        """Withdraw the bound if the gap is beyond it, by more than rounding explains: some step was not what it should be."""
        gap, bound = measured.get("head_gap_lower"), measured.get("bound_rounded")
        if gap is not None and bound is not None and gap > bound + 1e-3 * max(abs(bound), abs(measured["loss"])):
            said = f"the gap {gap:.6g} is above its bound {bound:.6g}, so some step was no step on this loss"
            self.claim.limit("steps of the rule", said)
            for name in ("bound", "bound_rounded"):
                self._state.history[-1].pop(name, None)

    def interrupted(self) -> None:
        """Withdraw the verdict if trunk or features are others when an error ends the run. Several ranks do not communicate."""
        if self._view.ranks.world == 1:
            self.warn_if_moved()
            self.claim.compare_features()
        else:
            self.claim.note([Check("trunk unmoved", None, "an error ended the run")])
            self._state.judge()

    def end(self) -> None:
        """Check that the trunk is unchanged, and that the network's own loss is the one that was said of these weights."""
        self.warn_if_moved()
        self.claim.compare_features()
        self.compare_own_loss()

    def compare_own_loss(self) -> None:
        """Call the network on the training set, and compare its loss with the last one that was measured, if that is of now."""
        said = self._said[1] if self._said is not None and self._said[0] == self._view.trainer.global_step else None
        measured = self.rule.is_bare and self._view.loss.cached_outputs is None  # by calling the network
        self.claim.compare_own_loss(None if measured else said, with_step=self.rule.is_solved)

    def warn_if_moved(self) -> None:
        """Compare the trunk with its fingerprints from the switch; if it moved, withdraw the verdict and warn.

        What enters neither features nor loss, such as an average of weights, may move.
        """
        state = self._state
        moved = self.trunk.moved_since(state.fingerprints)
        if moved and without_effect(self._view, moved):
            for name in moved:
                state.fingerprints.pop(name)
        elif moved:
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
        self.claim.release()
        self.trunk.release()
