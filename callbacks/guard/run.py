"""``GuardedRun``: phase 1, the switch, and phase 2 of one training run; the hooks of the callback call it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.attempt import rewatch
from lightning_conv.callbacks.guard.certify.checks import caveats, replaced
from lightning_conv.callbacks.guard.certify.run_checks import checks_of
from lightning_conv.callbacks.guard.head.phase_two import PhaseTwo
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.support import require_rule
from lightning_conv.callbacks.guard.switch.moment import plan_switch
from lightning_conv.callbacks.guard.switch.switch import Switch
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.logging import log_metrics, publish
from lightning_conv.losses.gradient import wide


class GuardedRun:
    """The two-phase rule on one run. All ranks make the same calls and reach the same decisions, from broadcast or averaged values.

    Args:
        trainer: Trainer of the run, about to train.
        pl_module: Module that it trains.
        settings: Settings of the guard.
        state: State of the guard, updated in place.

    Raises:
        MisconfigurationException: There is no usable head, the data have no random access, or ``switch_at`` is a share of an endless run.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: GuardSettings, state: GuardState
    ) -> None:
        self._trainer, self._settings, self._state = trainer, settings, state
        self._view = view = GuardView.of(trainer, pl_module, settings)
        self.head_name, self.words = view.head_name, view.words
        self._phase_two = PhaseTwo(view, settings, state)
        self._trunk = self._phase_two.trunk
        self._logged_step: int | None = None
        if state.phase == 2 and trainer.global_step == 0 and self._trunk.moved_since(state.fingerprints):
            state.forget()  # it was the state of another run, which ended in its first step
        if state.phase == 1:  # the present settings count, also for a resumed run that is to be longer
            state.plateau, state.switch_step = plan_switch(
                settings, state.plateau, trainer.estimated_stepping_batches, trainer.num_training_batches
            )
        view.loss.announce()
        require_rule(settings.step_rule, view)
        found = view.ranks.broadcast(checks_of(view, self._phase_two.rule.name != "base"))
        # The weights still bear what an earlier part of phase 2 did, so what failed in it stays.
        before = state.checks if state.phase == 2 else []
        state.checks = replaced(before, found)
        self._new_caveats = [said for said in state.caveats if said not in caveats(before)]
        self._switch = Switch(view, settings, state, self._phase_two, self.log)

    def start(self) -> None:
        """Start or resume the current phase."""
        state, step = self._state, self._trainer.global_step
        if state.caveats:
            rank_zero_warn(f"ExpressivityGuard: the guarantee is limited: {'; '.join(state.caveats)}")
        self._phase_two.claim.begin()
        if state.phase == 2:
            with self._trunk.in_eval_mode():
                rewatch(self._view, state)
                self._new_caveats += self._phase_two.claim.compare()
            state.judge()
            state.reason = "; ".join([state.reason, *self._new_caveats])
            self._phase_two.warn_if_moved()
            self._phase_two.begin()
            publish(self._trainer, state.metrics(state.history[-1]["step"] if state.history else step))
            return
        if state.declined:
            return
        when = f"after step {state.switch_step}" if state.plateau is None else "where the training loss comes to rest"
        width, size = self._view.head.width, self._view.rows
        rank_zero_info(
            f'ExpressivityGuard: head "{self.head_name}" (m_H = {width}), n = {size}, switch {when}; {self.words}'
        )
        # Reject a head that is too narrow before training (unless on_undecided="continue"), not at the switch.
        if (narrow := self._switch.narrow) is not None and self._settings.method != "alignment":
            state.verdict = "undecided"
            self._switch.undecided(f"{narrow}, or pass method='alignment' to train this head to its own infimum")
        if step == 0 and not state.declined:
            self._switch.track_rank("at_start")
        self.log()
        self._switch.if_due()

    def before_epoch(self) -> None:
        """Keep the module in eval mode in phase 2."""
        if self._state.phase == 2:
            self._trunk.keep_still()

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        """Prepare the comparisons of a batch.

        Args:
            batch: The batch that the training step is about to see.
            batch_idx: Its number in the epoch.
        """
        state = self._state
        if state.phase == 2:
            self._phase_two.before_batch(batch, batch_idx)
        elif not state.declined:
            last = None if state.switch_step is None else state.switch_step - 1
            self._phase_two.claim.before_batch(batch, batch_idx, last)

    def after_backward(self) -> None:
        """Look at no calls of the head until the next training step."""
        self._phase_two.after_backward()

    def before_step(self, optimizer: Optimizer) -> None:
        """Call the step rule of phase 2 between the backward pass and the optimizer step.

        Args:
            optimizer: Optimizer that is about to step.
        """
        if self._state.phase == 2:
            self._phase_two.before_step(optimizer)
        elif not self._state.declined:
            self._phase_two.claim.before_step()

    def after_batch(self, outputs: Any) -> None:
        """Record the loss of the batch, and switch to phase 2 if it is due.

        Args:
            outputs: Value that the training step returned: the loss, or a dict with the key ``loss``.
        """
        state = self._state
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it by the number of batches that are accumulated
            loss = wide(loss.detach()) * self._trainer.accumulate_grad_batches
        else:
            loss = None
        stepped = self._trainer.global_step > state.last_step
        self._phase_two.claim.gradients.after_batch(stepped)
        if state.phase == 2:
            self._phase_two.after_batch(loss)
        elif state.plateau is not None and not state.declined and loss is not None:
            state.plateau.observe(self._view.ranks.mean(loss))
        state.last_step = self._trainer.global_step
        if stepped:
            self._switch.if_due()

    def after_epoch(self) -> None:
        """Measure the training loss in phase 2, and log."""
        if self._state.phase == 2:
            self._phase_two.claim.after_epoch()
        if self._logged_step == self._trainer.global_step:  # a switch in the last step has logged everything
            return
        if self._state.phase == 2:
            self._phase_two.measure()
        self.log()

    def end(self) -> None:
        """Check that the trunk is unchanged, or warn that phase 2 was not reached."""
        state = self._state
        if state.phase == 2:
            self._phase_two.end()
        elif not state.declined:
            ended = f"the run ended at step {self._trainer.global_step}"
            if state.plateau is None:
                state.reason = f"{ended}, before the switch at {state.switch_step}"
            elif state.plateau.tries:  # the reason of the last certificate that failed
                state.reason = f"{ended}; {state.reason}"
            else:
                state.reason = f"{ended}, before the training loss came to rest"
            rank_zero_warn(f"ExpressivityGuard: {state.reason}; nothing was certified")

    def interrupted(self) -> None:
        """Withdraw the verdict if the trunk is another one when an error ends the run."""
        if self._state.phase == 2:
            self._phase_two.interrupted()

    def release(self) -> None:
        """Restore the module to its state before phase 2: its forward functions, ``requires_grad`` and modes."""
        self._phase_two.release()

    def log(self) -> None:
        """Send the current scalars to the loggers and to ``trainer.callback_metrics``."""
        log_metrics(self._trainer, self._state.metrics(self._trainer.global_step), self._trainer.global_step)
        self._logged_step = self._trainer.global_step
