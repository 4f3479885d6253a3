"""``GuardedRun``: phase 1, the switch, and phase 2 of one training run; the hooks of the callback call it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_conv.callbacks.guard.certify.attempt import attempt_certificate, rewatch
from lightning_conv.callbacks.guard.certify.certificate import Moment, rank_at
from lightning_conv.callbacks.guard.certify.checks import caveats, replaced
from lightning_conv.callbacks.guard.certify.run_checks import checks_of
from lightning_conv.callbacks.guard.head.phase_two import PhaseTwo
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.support import require_rule
from lightning_conv.callbacks.guard.switch.moment import plan_switch
from lightning_conv.callbacks.guard.switch.report import reason_to_switch, report_switch
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.logging import log_layout, log_metrics, log_text, publish
from lightning_conv.expressivity import too_narrow
from lightning_conv.losses.gradient import wide
from lightning_conv.networks.analytic import find_kinks
from lightning_conv.networks.perturbation import perturb


class ExpressivityError(RuntimeError):
    """The expressivity condition is not certified and ``on_undecided="raise"`` asks to stop."""


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
        self.head_name = view.head_name
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
        self._kinks = find_kinks(view.network, view.data.first_inputs())

    def start(self) -> None:
        """Start or resume the current phase."""
        state, step = self._state, self._trainer.global_step
        if state.caveats:
            rank_zero_warn(f"ExpressivityGuard: the guarantee is limited: {'; '.join(state.caveats)}")
        log_layout(self._trainer)
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
        width, size = self._view.head.width, self._view.data.size
        rank_zero_info(f'ExpressivityGuard: head "{self.head_name}" (m_H = {width}), n = {size}, switch {when}')
        # Reject a head that is too narrow before training (unless on_undecided="continue"), not at the switch.
        if (narrow := self._narrow) is not None and self._settings.method != "alignment":
            state.verdict = "undecided"
            self._undecided(f"{narrow}, or pass method='alignment' to train this head to its own infimum")
        if step == 0 and not state.declined:
            self._track_rank("at_start")
        self.log()
        self._switch_if_due()

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
        self._phase_two.claim.head.calls.after_backward()

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
            self._switch_if_due()

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

    @property
    def _narrow(self) -> str | None:
        return too_narrow(self._view.data.size, self._view.head.width, bias=self._view.head.has_bias)

    @property
    def _last_chance(self) -> bool:
        return self._state.switch_step is not None and self._trainer.global_step >= self._state.switch_step

    def _switch_if_due(self) -> None:
        state = self._state
        at_rest = state.plateau is not None and state.plateau.reached
        if state.phase == 1 and not state.declined and (at_rest or self._last_chance):
            self._switch()

    def _switch(self) -> None:
        state, step, view = self._state, self._trainer.global_step, self._view
        before = self._trunk.copy()
        try:
            view.ranks.agree_on(self._trunk.state())
            self._track_rank("before_noise")
            if trunk := self._trunk.trainable:
                state.perturbation = perturb(trunk, self._settings.noise_scale, self._settings.seed)
            rank_zero_info(
                f"ExpressivityGuard: certifying the rank of [h, 1], {view.data.size} x {view.head.width + 1}, at step {step}"
            )
            state.certified_on.clear()
            with self._trunk.in_eval_mode():  # hooks of the module may transform batches by its mode
                reason = attempt_certificate(self._view, self._settings, state, self._trainer.default_root_dir)
                enters = self._enters_phase_two
                if enters:
                    self._phase_two.claim.compare()
                    reason = self._phase_two.claim.untrainable or reason
            state.judge()
            if enters and not self._phase_two.claim.untrainable:
                state.reason = reason_to_switch(state, self._settings, step, reason, self._kinks)
                state.fingerprints = self._trunk.fingerprints()
                self._forget_directions()
                state.phase = 2
        finally:
            # Not certified, or an error (Ctrl-C included): a checkpoint saved now resumes in phase 1 and adds the noise only then.
            if state.phase == 1:
                self._trunk.put_back(before)
                state.perturbation = None
        if state.phase == 2:
            self._begin_phase_two(step)
            return
        self.log()
        log_text(self._trainer, "guard/reason", f"phase 1 goes on: {reason}", step)
        if self._settled:
            self._undecided(reason)
        elif state.plateau is not None:
            state.plateau.failed()
            state.reason = f"not certified at step {step}, tried again after {state.plateau.resting} windows: {reason}"
            rank_zero_info(f"ExpressivityGuard: {state.reason}")

    def _track_rank(self, moment: Moment) -> None:
        if self._settings.track_rank:
            self._state.ranks |= rank_at(moment, self._view)

    def _forget_directions(self) -> None:
        """Clear the curvature pairs of LBFGS: they cover all parameters and would move the trunk."""
        if isinstance(optimizer := self._trainer.optimizers[0], LBFGS):
            optimizer.state.clear()

    @property
    def _settled(self) -> bool:
        """Whether no later certificate can change the outcome."""
        state = self._state
        return state.plateau is None or self._last_chance or state.hopeless or self._narrow is not None

    @property
    def _enters_phase_two(self) -> bool:
        if self._state.certified or self._settings.method == "alignment":
            return True
        return self._settings.on_undecided == "continue" and self._settled

    def _begin_phase_two(self, step: int) -> None:
        state = self._state
        self._phase_two.begin()
        self._phase_two.rule.note_curvature()
        if state.certificate is not None and state.certificate.method == "alignment" and state.verdict != "certified":
            self._phase_two.rule.note_best_loss()
        rank_zero_info(f"ExpressivityGuard: {state.reason}")
        log_text(self._trainer, "guard/reason", report_switch(state, self.head_name), step)
        self._phase_two.measure()
        self._phase_two.compare_own_loss()
        self.log()

    def _undecided(self, reason: str) -> None:
        """Apply ``on_undecided``; return only if the run goes on.

        Args:
            reason: Reason why the condition is not certified.

        Raises:
            ExpressivityError: ``on_undecided="raise"``.
        """
        self._state.reason = reason
        if self._settings.on_undecided == "raise":
            raise ExpressivityError(f"ExpressivityGuard: {reason}")
        if self._settings.on_undecided == "warn":
            self._state.declined = True
            self._phase_two.claim.release()
            rank_zero_warn(f"ExpressivityGuard: {reason}. Training of all layers goes on, without the guarantee")
