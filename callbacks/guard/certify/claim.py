"""``Claim``: the checks of the guard's claim are made as the run goes on, and the verdict follows them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_conv.callbacks.guard.certify.checks import Check, CheckName, of_reasons, replaced
from lightning_conv.callbacks.guard.certify.gradient_watch import GradientWatch
from lightning_conv.callbacks.guard.certify.head_watch import HeadWatch
from lightning_conv.callbacks.guard.certify.kept_loss import KeptLoss
from lightning_conv.callbacks.guard.certify.known_samples import KnownSamples
from lightning_conv.callbacks.guard.certify.mixed_batches import compare_mixed, is_named
from lightning_conv.callbacks.guard.certify.own_loss import own_loss
from lightning_conv.callbacks.guard.certify.step_check import compare_with_step
from lightning_conv.callbacks.guard.certify.training_pass import lost_in_precision, walk
from lightning_conv.callbacks.guard.certify.trunk_rounding import within_rounding
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.logging import log_text
from lightning_conv.networks.undisturbed import without_fused_attention


def without_numbers(said: str) -> str:
    """Return a sentence without its numbers, to tell whether another one says the same.

    Args:
        said: The sentence.
    """
    return re.sub(r"-?\d[\d.]*(e[+-]?\d+)?", "#", said)


class Claim:
    """Makes and keeps the checks of the claim that the last layer's infimum is the global one of the loss that the training step minimises.

    Args:
        view: The run.
        state: State of the guard, updated in place.

    Attributes:
        gradients: Comparison of the gradients in some steps.
        head: Watch over the head in every step.
        samples: The samples and features that the certificate is about.
        give_up: Function that withdraws what was proven of the steps; it is called with the reason when a check fails.
        untrainable: Why the head cannot be trained on the frozen trunk; empty: it can, or that is not known.
        other_loss: How the loss of the training step was seen to differ from ``loss_fn``, in this part of the run; empty if it was not.
    """

    def __init__(self, view: GuardView, state: GuardState) -> None:
        self._view, self._state = view, state
        self.samples = KnownSamples(view, state)
        self.gradients, self.head, self._loss = GradientWatch(view), HeadWatch(view), KeptLoss(view)
        self.give_up: Callable[[str], None] = lambda _: None
        self.other_loss = self.untrainable = ""
        self._compared_at: int | None = None  # step at which the network's own loss was compared

    def compare(self) -> list[str]:
        """Make the checks that need the training step and the training set, before the verdict is said and anything is written.

        Returns:
            What those saw that failed for the first time, each of which was said in a warning.
        """
        before = self._state.caveats
        self._compared_at = self._view.trainer.global_step
        seen = [
            *of_reasons("trunk unmoved", []),
            *compare_with_step(self._view),
            *self._compare_mixed(),
            self.gradients.check(),
            *self.head.found,
        ]
        self.note([*seen, *self._of_walk(with_step=True)])
        self._loss.keep()
        new = [said for said in self._state.caveats if said not in before]
        for said in new:
            rank_zero_warn(f"ExpressivityGuard: the guarantee is limited: {said}")
        return new

    def _compare_mixed(self) -> list[Check]:
        """Look at batches as the run draws them, where the loss is not compared with one of torch's in every step."""
        if is_named(self._view):
            return []
        with attempted(Exception) as attempt, without_fused_attention():  # the step is any code of the user's
            said = compare_mixed(self._view)
        if attempt.failed:
            said = f"the training step could not be run on batches as the run draws them: {attempt.reason}"
        return [Check("compared with the step", None if attempt.failed else False, said)] if said else []

    def _of_walk(self, *, with_step: bool, logged: float | None = None) -> list[Check]:
        """Make the checks that take a pass over the training set."""
        with attempted(Exception) as attempt, without_fused_attention():  # the step is any code of the user's
            certificate = self._state.certificate
            within = certificate is not None and certificate.rounding > 0
            walked = walk(self._view, with_step=with_step, varying=within)
            if with_step:
                self.untrainable = walked.frozen
            told = {
                "compared with the step": walked.step,
                "same loss to the end": walked.later,
                "same features in the step": walked.features,
                "full precision": walked.rounded
                or lost_in_precision(walked, rank=self._claims_rank)
                or within_rounding(certificate, varies=walked.varies),
            }
            failed = [Check(name, False, said) for name, said in told.items() if said]  # type: ignore[arg-type]
            return [*failed, own_loss(self._view, walked, logged), *self.samples.learn(walked)]
        why = f"the network or the training step could not be called on the training set: {attempt.reason}"
        return [Check("own loss", None, why)]

    @property
    def _claims_rank(self) -> bool:
        certificate = self._state.certificate
        return certificate is not None and certificate.verdict == "certified" and certificate.method != "alignment"

    def note(self, checks: Sequence[Check]) -> None:
        """Replace the checks of these names, without a new verdict.

        Args:
            checks: Checks that were made now.
        """
        self._state.checks = replaced(self._state.checks, checks)
        failed = [each.said for each in checks if each.name == "compared with the step" and each.held is False]
        self.other_loss = failed[0] if failed else self.other_loss

    def holds(self, name: CheckName) -> bool:
        """Tell whether a check was made and held so far.

        Args:
            name: Name of the check.
        """
        made = [check.held for check in self._state.checks if check.name == name]
        return bool(made) and all(made)

    def begin(self) -> None:
        """Watch the head from now on."""
        self.head.begin()

    def before_batch(self, batch: Any, batch_idx: int, last: int | None = None) -> None:
        """Prepare the comparisons of a batch.

        Args:
            batch: The batch that the training step is about to see.
            batch_idx: Its number in the epoch.
            last: Number of the last step before the switch, where it is known.
        """
        self.gradients.before_batch(batch, batch_idx, last)
        if self._state.phase == 2:
            seen, expected = self.samples.look(batch, batch_idx)
            self.take_all(seen)
            self.head.calls.before_batch(batch, expected)
        else:
            self.head.calls.before_batch(None, None)
            self.samples.remember(batch)

    def before_step(self) -> None:
        """Compare the gradients where the optimizer is about to step. All ranks call it together."""
        with attempted(Exception) as attempt:  # gradients may be of any kind
            self.gradients.before_step()
            self.head.before_step()
        if attempt.failed:
            self.take_all(
                [Check("gradients of the step", False, f"gradients could not be compared ({attempt.reason})")]
            )

    def hold_head(self) -> None:
        """Remember the head and its gradient as the step rule leaves them to the optimizer."""
        self.head.hold()

    def take_steps(self) -> None:
        """Take what the steps showed into the verdict, if it is something else than before."""
        self.take_all([*self.head.found, *([] if self.gradients.found is None else [self.gradients.found])])

    def after_batch(self) -> None:
        """Count the samples of a batch of phase 2."""
        self._take_drawn(self.samples.after_batch(self._view.trainer.is_last_batch))

    def after_epoch(self) -> None:
        """Take in whether batches of an epoch of phase 2 were skipped."""
        trainer = self._view.trainer
        ending = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        self._take_drawn(self.samples.after_epoch(ending))

    def _take_drawn(self, checks: Sequence[Check]) -> None:
        """Take in what the samples that were drawn show, unless the settings of the run say it already."""
        if not any(check.name == "every sample alike" and check.held is False for check in self._state.checks):
            self.take_all(checks)

    def compare_features(self) -> None:
        """Compare the features of some samples with those that were certified, and the head with what the last step left.

        All ranks call it together, and get what any of them saw in its steps.
        """
        self.head.compare_left()
        seen = [check for found in self._view.ranks.gather(lambda: self.head.found) for check in found]
        self.take_all([*seen, *self.samples.compare()])

    def compare_loss(self) -> None:
        """Compare the training step's loss of given outputs with what it was at the switch. All ranks call it together."""
        self.take_all(self._loss.compare())

    def take_all(self, checks: Sequence[Check]) -> None:
        """Take the checks that are new into the verdict.

        Args:
            checks: Checks that were made now.
        """
        for check in checks:
            if check not in self._state.checks:
                self.take(check)

    def release(self) -> None:
        """Leave the head without hooks."""
        self.head.end()

    def compare_own_loss(self, logged: float | None, *, with_step: bool = False) -> None:
        """Call the network on the training set (``own_loss``), unless that was done at these weights and nothing new was said of them.

        Args:
            logged: Loss that was said to be the network's at these weights, if it was not measured by calling it.
            with_step: Whether to run the training step there, too: a head that was solved is where no step was seen.
        """
        step = self._view.trainer.global_step
        if logged is not None or step != self._compared_at:
            self._compared_at = step
            for check in self._of_walk(with_step=with_step, logged=logged):
                self.take(check)

    def take(self, check: Check) -> None:
        """Take a check into the verdict; one that failed is said and logged.

        Args:
            check: Check that was made now.
        """
        if check.held is False:
            self.limit(check.name, check.said)
            return
        self.note([check])
        self._state.judge()

    def limit(self, name: CheckName, caveat: str) -> None:
        """Add a caveat found during the run, withdraw what was proven of the steps, and judge again.

        Args:
            name: Name of the check that failed.
            caveat: Reason why the guarantee is limited.
        """
        state, trainer = self._state, self._view.trainer
        if any(
            without_numbers(each).startswith(without_numbers(caveat)) for each in state.caveats
        ):  # said of another step
            return
        self.note([Check(name, False, caveat)])
        self.give_up(caveat)
        state.judge()
        state.add_reason(caveat)
        rank_zero_warn(f"ExpressivityGuard: the guarantee is limited: {caveat}")
        log_text(trainer, "guard/reason", state.reason, trainer.global_step)

    def withdraw(self, said: str) -> None:
        """Withdraw the verdict because the trunk moved.

        Args:
            said: What moved, which becomes the reason.
        """
        state, trainer = self._state, self._view.trainer
        self.note([Check("trunk unmoved", False, said)])
        state.judge()
        state.reason = said
        rank_zero_warn(f"ExpressivityGuard: {said}")
        log_text(trainer, "guard/reason", said, trainer.global_step)
