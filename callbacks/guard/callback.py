"""``ExpressivityGuard``: train everything, perturb, certify that the last hidden features have full rank, then train the head only."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks.guard.certify.checks import Check, of_certificate
from lightning_conv.callbacks.guard.head.descent import HeadDescent, descent_of
from lightning_conv.callbacks.guard.run import GuardedRun
from lightning_conv.callbacks.guard.settings import GuardSettings
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.guard.support import require_supported
from lightning_conv.callbacks.guard.switch.switch import ExpressivityError
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.logging import warn_without_logger
from lightning_conv.callbacks.run.run_log import LogsOfRun
from lightning_conv.expressivity import RankCertificate
from lightning_conv.networks.perturbation import Perturbation
from lightning_conv.theory.criterion import Verdict

__all__ = ["ExpressivityError", "ExpressivityGuard"]


class ExpressivityGuard(GuardSettings, LogsOfRun):
    """Enforces the expressivity-guarded two-phase rule, after Kawaguchi & Sun 2021, Algorithm 1 (2104.05785).

    Phase 1 trains all weights by the module's own optimizer. At the switch, time tau, Gaussian noise is added to the trunk (everything
    but the last linear layer, the head). Then the rank of [h, 1] is certified in float64: h are the last hidden features of all n
    training samples in eval mode, and the column of ones is there if a bias is trained.

    If the rank is n, phase 2 begins: only the head is trained. For a loss that is convex in the outputs this problem is convex, and its
    infimum is the global infimum of the training loss over all weights. In phase 2 the trunk is constant bit for bit: it has no
    gradients, and the whole module is in eval mode.

    Whatever limits the guarantee in a run (random inputs, weight decay on the head, samples left out) is reported in a warning and in
    ``reason``. When the fit ends, also in an error, the module is trainable again. The callback supports a single device and
    ``strategy="ddp"``; docs/guard.md describes every setting and the configurations that are rejected.

    Logged, to every logger and to ``trainer.callback_metrics``:

    - ``guard/phase``: 1 or 2, at the start, the switch and the end of every epoch
    - ``guard/rank``, ``guard/samples``: certified rank of [h, 1], and n; ``guard/sigma_min`` with ``_lower``: n-th
      singular value; ``guard/sigma_max``; ``guard/distance``, ``guard/residual``: numbers of the other methods
    - ``guard/curvature``, ``guard/largest_step``: L_H of the head's mean loss and 2 / L_H, where they are known
    - ``guard/rank_at_start``, ``guard/rank_before_noise``, and ``sigma_min`` likewise: with ``track_rank``; the other ranks are
      after the noise
    - ``guard/noise``: relative norm of the perturbation
    - ``guard/loss``: mean loss on the whole training set in eval mode, at the switch and at the end of every phase-2
      epoch
    - ``guard/gap``: ``guard/loss`` minus the global infimum of the loss
    - ``guard/step_size``: step size of ``step_rule="certified"``; ``guard/bound``: proven upper bound of the gap, while all steps are
      plain full-batch gradient steps of at most 1 / L_H, those of that rule or of plain SGD
    - ``guard/best_loss``: the loss that a head that is too narrow can come down to on this trunk
    - text ``guard/reason`` (TensorBoard): the decision, and the reason for it

    Args:
        switch_at: tau, a share of the run in (0, 1) or a number of optimizer steps. ``"auto"``: where the training loss has come
            to rest and the condition is certified; if it is not, the switch is tried again with back-off until ``latest_switch``.
        head: Dotted name of the last linear layer; None: it is searched for.
        noise_scale: Standard deviation of the noise, relative to the root mean square of each tensor.
        on_undecided: Action if the condition is not certified. ``"warn"``: take the noise back, warn, and go on training
            all layers. ``"raise"``: stop with ``ExpressivityError``. ``"continue"``: enter phase 2 without the
            guarantee; with ``switch_at="auto"`` at once where the condition is refuted, otherwise after the last attempt.
        seed: Seed of the noise.
        loss_fn: ``loss_fn(outputs, targets)`` of the training step, for the gap; None: it is observed in the step. Where it is unknown, the
            step is compared with the one loss module on the LightningModule, if there is one.
        infimum: Infimum of the mean loss over all outputs, or a function of the targets that returns it for each sample; None: that
            of torch's losses (0, or the entropy of soft or smoothed targets); for others the gap is not logged.
        input_fn: Function that takes the model's input out of a batch, see ``Probe``; default: what the training step calls it on.
        target_fn: Function that takes the targets out of a batch; default: those of the observed loss, ``batch[1]`` or the keys
            y, target(s), label(s).
        forward_fn: ``forward_fn(module, inputs)`` returns the outputs; default: the call that the training step makes, or
            ``module(inputs)`` where ``input_fn`` is given.
        method: Method of the certificate, see ``certify_expressivity``. ``"auto"``: at the present weights (``"singular"``); where
            that is predicted to take more than ten minutes, for almost every weight of a wide last hidden layer (``"distinct"``).
            ``"alignment"`` trains a head that is too narrow to its own infimum and says how far from the targets that must stay.
        step_rule: Rule that trains the head in phase 2. ``"base"``: the optimizer of the run. ``"certified"``: plain gradient steps of the
            size that the proof allows, in place of the optimizer's, for the head only. ``"solve"``: the convex problem of the head
            is solved at the switch, and the run ends; where ``tol`` is not reached, the optimizer goes on.
        cache_features: Whether to compute the trunk's forward once in phase 2 and to look its results up. Where that is not provably
            the same training (up to rounding), the guard goes on without and says so.
        plateau_threshold: For ``switch_at="auto"``: relative improvement of the mean training loss of a window that counts.
        plateau_patience: For ``switch_at="auto"``: number of windows without such an improvement.
        plateau_window: For ``switch_at="auto"``: number of batches in a window; None: an epoch.
        latest_switch: For ``switch_at="auto"``: share of the run after which the switch is tried for the last time.
        tol: Gap to which ``step_rule="solve"`` solves.
        track_rank: Whether to certify the rank also at the start and before the noise of the switch, for the log only. Each of the two
            costs as much as a certificate.

    Raises:
        MisconfigurationException: There are several optimizers, manual optimization, a strategy other than DDP on several devices,
            weight averaging, an endless run with a share for ``switch_at``, no usable linear head, a network that cannot be called, or
            bad arguments.
        ExpressivityError: The condition is not certified, and ``on_undecided="raise"``.

    Cost: once, two passes over the training set and one SVD of n x (m_H + 1); one pass per phase-2 epoch. A phase-2 step is
    cheaper than a phase-1 step: it has no backward pass through the trunk. With ``cache_features`` there is no forward pass either, in
    steps and at the ends of epochs (then n m_H numbers of memory and one more pass).

    Example::

        trainer = Trainer(max_epochs=50, callbacks=[ExpressivityGuard(switch_at=0.6)])
    """

    def __post_init__(self) -> None:
        """Check the arguments, and start with an empty state."""
        super().__post_init__()
        self._state = GuardState()
        self._run: GuardedRun | None = None
        self._head_name, self._measured = self.head, ""

    @property
    def settings(self) -> GuardSettings:
        """The arguments of the guard."""
        return self

    @property
    def phase(self) -> int:
        """The phase of the run. 1: everything is trained; 2: the head only."""
        return self._state.phase

    @property
    def reason(self) -> str:
        """The reason why the run is in this phase."""
        return self._state.reason

    @property
    def verdict(self) -> Verdict:
        """The verdict on the claim that the infimum over the last layer is the global one, that of the training loss over all outputs."""
        return self._state.verdict

    @property
    def why(self) -> str:
        """The reason why the verdict is not ``"certified"``, where neither the certificate nor a caveat says so."""
        return self._state.why

    @property
    def declined(self) -> bool:
        """Whether the condition was not certified and the run goes on training everything."""
        return self._state.declined

    @property
    def descent(self) -> HeadDescent:
        """The head's steps in phase 2: whether a theorem covers them, their gaps and bounds."""
        state, rule = self._state, self.settings.step_rule
        return descent_of(state.steps, rule, state.history, state.caveats, state.curvature)

    @property
    def caveats(self) -> list[str]:
        """Reasons why the guarantee is limited in this run."""
        return self._state.caveats

    @property
    def checks(self) -> list[Check]:
        """The checks that the verdict rests on, each with its name, whether it held, and what was seen."""
        return [*self._state.checks, *of_certificate(self._state.certificate)]

    @property
    def certificate(self) -> RankCertificate | None:
        """The certificate of the switch, once it is computed."""
        return self._state.certificate

    @property
    def perturbation(self) -> Perturbation | None:
        """The noise of the switch, once it is added."""
        return self._state.perturbation

    @property
    def history(self) -> list[dict[str, float]]:
        """Measurements of phase 2 in order: ``step``, ``epoch``, ``loss``, ``gap`` and numbers of the step rule, as far as known."""
        return self._state.history

    @property
    def measured(self) -> str:
        """How network and loss were found: ``observed``, ``given``, or ``unknown`` with the reason; empty before the run."""
        return self._measured

    @property
    def head_name(self) -> str | None:
        """The dotted name of the last linear layer, once it is known."""
        return self._head_name

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            require_supported(trainer, pl_module)
            warn_without_logger(trainer, self, "phase, rank and gap")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._measured = GuardView.of(
                trainer, pl_module, self.settings
            ).words  # a run that is refused is refused here
            return
        self.begin_log(trainer)
        if trainer.global_step < self._state.last_step:
            self._state.forget()  # the state is that of another run
        self._run = GuardedRun(trainer, pl_module, self.settings, self._state)
        self._head_name, self._measured = self._run.head_name, self._run.words
        self._run.start()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run is not None:
            self._run.before_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None:
            self._run.before_batch(batch, batch_idx)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run is not None:
            self._run.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._run is not None:
            self._run.before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None:
            self._run.after_batch(outputs)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run is not None:
            self._run.after_epoch()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run is not None:
            self._run.end()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release()
            self.end_log(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._run is not None:
            with attempted(Exception):
                self._run.interrupted()
        self._release()  # Lightning skips teardown then
        self.end_log(trainer, pl_module, succeeded=False)

    def _release(self) -> None:
        if self._run is not None:
            self._run.release()
        self._run = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._state.as_plain()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = GuardState.from_plain(state_dict)
        self._run = None
