"""One guarded training run: phase 1, the switch, and then phase 2; what the hooks of the callback do."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.caveats import find_caveats
from lightning_conv.callbacks.guard.certify.certificate import certify_trunk
from lightning_conv.callbacks.guard.certify.rank_track import Moment, rank_at
from lightning_conv.callbacks.guard.certify.verdict import loss_kind
from lightning_conv.callbacks.guard.head.phase_two import PhaseTwo
from lightning_conv.callbacks.guard.head.training_loss import TrainingLoss
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.support import forget_directions, require_rule, usable_head
from lightning_conv.callbacks.guard.switch.plan import plan_switch
from lightning_conv.callbacks.guard.switch.reason import reason_to_switch
from lightning_conv.callbacks.run.logging import log_layout, log_metrics, log_text, publish
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.expressivity import too_narrow
from lightning_conv.losses.gradient import wide
from lightning_conv.networks.analytic import find_kinks
from lightning_conv.networks.head import called_by
from lightning_conv.networks.perturbation import perturb


class ExpressivityError(RuntimeError):
    """The expressivity condition is not certified and ``on_undecided="raise"`` asks to stop."""


class GuardedRun:
    """The two-phase rule on one run. All ranks go through it alike; what decides is computed once and sent to all.

    Args:
        trainer: of the run, about to train.
        pl_module: of the run.
        settings: of the guard.
        state: its memory, which the run goes on writing.

    Raises:
        MisconfigurationException: no usable head, no random access to the data, a share of an endless run.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, settings: GuardSettings, state: GuardState
    ) -> None:
        self._trainer, self._module, self._settings, self._state = trainer, pl_module, settings, state
        self._ranks = Ranks(trainer)
        self._network = called_by(pl_module, settings.forward_fn)
        self._data = TrainingSet(trainer, settings.input_fn, self._ranks)
        inputs = self._data.first_inputs()
        self.head = usable_head(trainer, pl_module, self._network, inputs, settings.qualified(settings.head))
        self.head_name = settings.said(self.head.name)
        # What the head's result goes through is not checked, so the infimum of the whole is not known.
        known = self.head.last or settings.infimum is not None
        self._loss = TrainingLoss(
            pl_module, settings.loss_fn, settings.infimum if known else math.nan, settings.target_fn
        )
        self._phase_two = PhaseTwo(
            trainer, pl_module, self._network, self.head, self._data, self._loss, settings, state
        )
        self._trunk = self._phase_two.trunk
        self._logged_step: int | None = None
        if state.phase == 2 and trainer.global_step == 0 and self._trunk.moved_since(state.fingerprints):
            state.forget()  # it was the memory of another run, which ended in its first step
        if state.phase == 1:  # the present settings count, also for a resumed run that is to be longer
            plan_switch(settings, state, trainer.estimated_stepping_batches, trainer.num_training_batches)
        self._loss.announce(self._data, self.head.module.out_features)
        if settings.step_rule != "base":
            require_rule(settings, self._loss, self.head, trainer, self._data)
        found = self._ranks.broadcast(find_caveats(trainer, self._data, self.head, self._phase_two.rule != "base"))
        # What limited an earlier part of phase 2 is still in its weights.
        before = state.caveats if state.phase == 2 else []
        self._new_caveats = [caveat for caveat in found if caveat not in before]
        state.caveats = [*before, *self._new_caveats]
        self._kinks = [str(kink) for kink in find_kinks(self._network, inputs)]

    def start(self) -> None:
        """Begin, or go on with, the phase that the run is in."""
        state, step = self._state, self._trainer.global_step
        if state.caveats:
            rank_zero_warn(f"ExpressivityGuard: the guarantee is limited: {'; '.join(state.caveats)}")
        log_layout(self._trainer)
        if state.phase == 2:
            state.judge()
            state.reason = "; ".join([state.reason, *self._new_caveats])
            self._phase_two.warn_if_moved()
            self._phase_two.begin()
            publish(self._trainer, state.metrics(state.history[-1]["step"] if state.history else step))
            return
        if state.declined:
            return
        when = f"after step {state.switch_step}" if state.plateau is None else "where the training loss comes to rest"
        rank_zero_info(
            f'ExpressivityGuard: head "{self.head_name}" (m_H = {self.head.width}), n = {self._data.size}, switch {when}'
        )
        # Said at the start of a run, not after most of it.
        narrow = self._narrow
        if narrow is not None and self._settings.method != "alignment":
            state.verdict = "undecided"
            self._undecided(f"{narrow}, or pass method='alignment' to train this head to its own infimum")
        if step == 0 and not state.declined:
            self._track_rank("at_start")
        self.log()
        self._switch_if_due()

    def before_batch(self, batch: Any | None = None) -> None:
        """Before a batch, or an epoch."""
        if self._state.phase == 2 and batch is None:
            self._trunk.keep_still()
        elif self._state.phase == 2:
            self._phase_two.before_batch(batch)

    def before_step(self, optimizer: Optimizer) -> None:
        """The gradients are there, the optimizer is about to step."""
        if self._state.phase == 2:
            self._phase_two.before_step(optimizer)

    def after_batch(self, outputs: Any) -> None:
        """Take in the loss of a batch; switch if it is time."""
        state = self._state
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor):  # Lightning has divided it by the number of batches that are accumulated
            loss = wide(loss.detach()) * self._trainer.accumulate_grad_batches
        else:
            loss = None
        if state.phase == 2:
            self._phase_two.after_batch(loss)
        elif state.plateau is not None and not state.declined and loss is not None:
            state.plateau.observe(self._ranks.mean(loss))
        stepped = self._trainer.global_step > state.last_step
        state.last_step = self._trainer.global_step
        if stepped:
            self._switch_if_due()

    def after_epoch(self) -> None:
        """Measure in phase 2, and log."""
        if self._logged_step == self._trainer.global_step:  # a switch in the last step has logged it all
            return
        if self._state.phase == 2:
            self._phase_two.measure()
        self.log()

    def end(self) -> None:
        """Check that the trunk kept still, or say that it never came to phase 2."""
        state = self._state
        if state.phase == 2:
            self._phase_two.warn_if_moved()
        elif not state.declined:
            before = (
                "the training loss came to rest" if state.plateau is not None else f"the switch at {state.switch_step}"
            )
            state.reason = f"the run ended at step {self._trainer.global_step}, before {before}"
            rank_zero_warn(f"ExpressivityGuard: {state.reason}; nothing was certified")

    def release(self) -> None:
        """Hand the module back as it was."""
        self._phase_two.release()

    def log(self) -> None:
        """Send what is known now to the loggers and to ``trainer.callback_metrics``."""
        log_metrics(self._trainer, self._state.metrics(self._trainer.global_step), self._trainer.global_step)
        self._logged_step = self._trainer.global_step

    @property
    def _narrow(self) -> str | None:
        return too_narrow(self._data.size, self.head.width, bias=self.head.has_bias)

    @property
    def _last_chance(self) -> bool:
        return self._state.switch_step is not None and self._trainer.global_step >= self._state.switch_step

    def _switch_if_due(self) -> None:
        state = self._state
        at_rest = state.plateau is not None and state.plateau.reached
        if state.phase == 1 and not state.declined and (at_rest or self._last_chance):
            self._switch()

    def _switch(self) -> None:
        state, step = self._state, self._trainer.global_step
        before = self._trunk.copy()
        try:
            self._ranks.agree_on(self._trunk.state())
            self._track_rank("before_noise")
            if trunk := self._trunk.trainable:
                state.perturbation = perturb(trunk, self._settings.noise_scale, self._settings.seed)
            rank_zero_info(
                f"ExpressivityGuard: certifying the rank of [h, 1], {self._data.size} x {self.head.width + 1}, at step {step}"
            )
            reason = self._certify()
            state.judge()
            enters = self._enters_phase_two
            if enters:
                state.reason = reason_to_switch(state, self._settings, step, reason, self._kinks)
                state.fingerprints = self._trunk.fingerprints()
                forget_directions(self._trainer.optimizers[0])
                state.phase = 2
            else:
                self._take_back(before)
        except BaseException:
            # Ctrl-C, too: a checkpoint that is saved now resumes in phase 1, and adds the noise then.
            if state.phase == 1:
                self._take_back(before)
            raise
        if enters:
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
            self._state.ranks |= rank_at(moment, self._data, self._network, self.head)

    @property
    def _settled(self) -> bool:
        """Whether what the certificate said is the last word: another try comes too late, or cannot say anything else."""
        state = self._state
        return state.plateau is None or self._last_chance or state.hopeless or self._narrow is not None

    @property
    def _enters_phase_two(self) -> bool:
        if self._state.certified or self._settings.method == "alignment":
            return True
        return self._settings.on_undecided == "continue" and self._settled

    def _take_back(self, before: dict[str, torch.Tensor]) -> None:
        self._trunk.put_back(before)
        self._state.perturbation = None

    def _begin_phase_two(self, step: int) -> None:
        state = self._state
        self._phase_two.begin()
        self._phase_two.note_curvature()
        if state.certificate is not None and state.certificate.method == "alignment" and state.verdict != "certified":
            self._phase_two.note_best_loss()
        rank_zero_info(f"ExpressivityGuard: {state.reason}")
        log_text(self._trainer, "guard/reason", state.report(self.head_name), step)
        self._phase_two.measure()
        self.log()

    def _undecided(self, reason: str) -> None:
        """Follow ``on_undecided``; returns only if the run goes on.

        Raises:
            ExpressivityError: ``on_undecided="raise"``.
        """
        self._state.reason = reason
        if self._settings.on_undecided == "raise":
            raise ExpressivityError(f"ExpressivityGuard: {reason}")
        if self._settings.on_undecided == "warn":
            self._state.declined = True
            rank_zero_warn(f"ExpressivityGuard: {reason}. Training of all layers goes on, without the guarantee")

    def _certify(self) -> str:
        """Take the certificate; whatever goes wrong leaves the condition undecided rather than ending the run."""
        state, method = self._state, self._settings.method
        state.certificate = None
        try:
            asked = method == "alignment" or (method == "auto" and self._narrow is not None)
            targets = self._targets() if asked else None
            state.certificate = certify_trunk(
                self._data, self._network, self.head, method, targets, self._trainer.default_root_dir
            )
        except Exception as error:  # whatever it is, the run goes on without the guarantee
            return f"no certificate could be computed ({type(error).__name__}: {error})"
        return state.certificate.reason

    def _targets(self) -> torch.Tensor:
        """What the trained part of the head is to reach: numbers for a loss of numbers, less a bias that is not trained."""
        targets, fixed = self._loss.targets(self._data), self.head.fixed_bias
        self._state.loss_kind = loss_kind(self._loss.loss_fn, targets)
        if self._state.loss_kind != "distance":
            return targets
        rows = targets.double().reshape(len(targets), -1)
        return rows if fixed is None else rows - fixed.detach().double().cpu()
