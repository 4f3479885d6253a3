"""``Switch``: the noise, the certificate and the comparisons between the two phases, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import LBFGS

from lightning_conv.callbacks.guard.certify.attempt import attempt_certificate
from lightning_conv.callbacks.guard.certify.certificate import Moment, rank_at
from lightning_conv.callbacks.guard.head.phase_two import PhaseTwo
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.switch.report import reason_to_switch, report_switch
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.logging import log_text
from lightning_conv.expressivity import too_narrow
from lightning_conv.networks.analytic import find_kinks
from lightning_conv.networks.perturbation import perturb


class ExpressivityError(RuntimeError):
    """Says that the expressivity condition is not certified and ``on_undecided="raise"`` asks to stop."""


class Switch:
    """Certifies the trunk once that is due, and begins phase 2 or goes on with phase 1.

    Args:
        view: The run.
        settings: Settings of the guard.
        state: State of the guard, updated in place.
        phase_two: Phase 2 of the run.
        log: Function that sends the current scalars to the loggers.
    """

    def __init__(
        self, view: GuardView, settings: GuardSettings, state: GuardState, phase_two: PhaseTwo, log: Callable[[], None]
    ) -> None:
        self._view, self._settings, self._state, self._phase_two, self._log = view, settings, state, phase_two, log
        self._trainer: pl.Trainer = view.trainer
        self._trunk = phase_two.trunk
        self._kinks = find_kinks(view.network, view.data.first_inputs())

    @property
    def narrow(self) -> str | None:
        """Why the head is too narrow for rank n; None: it is not."""
        return too_narrow(self._view.rows, self._view.head.width, bias=self._view.head.has_bias)

    def if_due(self) -> None:
        """Switch if the planned step is reached, or the training loss has come to rest."""
        state = self._state
        at_rest = state.plateau is not None and state.plateau.reached
        if state.phase == 1 and not state.declined and (at_rest or self._last_chance):
            self._switch()

    def track_rank(self, moment: Moment) -> None:
        """Certify the rank at the present weights, if ``track_rank`` asks for it.

        Args:
            moment: Moment of the run.
        """
        if self._settings.track_rank:
            self._state.ranks |= rank_at(moment, self._view)

    def undecided(self, reason: str) -> None:
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

    def _switch(self) -> None:
        state, step, view = self._state, self._trainer.global_step, self._view
        before = self._trunk.copy()
        try:
            view.ranks.agree_on(self._trunk.state())
            self.track_rank("before_noise")
            if trunk := self._trunk.trainable:
                state.perturbation = perturb(trunk, self._settings.noise_scale, self._settings.seed)
            rank_zero_info(
                f"ExpressivityGuard: certifying the rank of [h, 1], {view.rows} x {view.head.width + 1}, at step {step}"
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
        self._log()
        log_text(self._trainer, "guard/reason", f"phase 1 goes on: {reason}", step)
        if self._settled:
            self.undecided(reason)
        elif state.plateau is not None:
            state.plateau.failed()
            state.reason = f"not certified at step {step}, tried again after {state.plateau.resting} windows: {reason}"
            rank_zero_info(f"ExpressivityGuard: {state.reason}")

    def _forget_directions(self) -> None:
        """Clear the curvature pairs of LBFGS: they cover all parameters and would move the trunk."""
        if isinstance(optimizer := self._trainer.optimizers[0], LBFGS):
            optimizer.state.clear()

    @property
    def _last_chance(self) -> bool:
        return self._state.switch_step is not None and self._trainer.global_step >= self._state.switch_step

    @property
    def _settled(self) -> bool:
        """Tell whether no later certificate can change the outcome."""
        state = self._state
        return state.plateau is None or self._last_chance or state.hopeless or self.narrow is not None

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
        log_text(self._trainer, "guard/reason", report_switch(state, self._view.head_name), step)
        self._phase_two.measure()
        self._phase_two.compare_own_loss()
        self._log()
