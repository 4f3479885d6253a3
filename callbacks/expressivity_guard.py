"""``ExpressivityGuard``: train everything, perturb, certify that the last hidden features have full rank, then train the head only."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_conv.anatomy import Head, called_by, find_head
from lightning_conv.callbacks._logging import log_layout, log_metrics, log_text, publish, warn_without_logger
from lightning_conv.callbacks.batch import InputFn, TargetFn
from lightning_conv.callbacks.caveats import find_caveats
from lightning_conv.callbacks.frozen_trunk import FrozenTrunk
from lightning_conv.callbacks.guard_state import GuardState
from lightning_conv.callbacks.probe import ForwardFn, cannot_call
from lightning_conv.callbacks.training_loss import LossFn, TrainingLoss
from lightning_conv.callbacks.training_set import TrainingSet
from lightning_conv.callbacks.trunk_certificate import certify_trunk
from lightning_conv.expressivity import RankCertificate, too_narrow
from lightning_conv.two_phase import Perturbation, perturb

OnUndecided = Literal["warn", "raise", "continue"]


class ExpressivityError(RuntimeError):
    """The expressivity condition is not certified and ``on_undecided="raise"`` asks to stop."""


class ExpressivityGuard(pl.Callback):
    """Enforces the expressivity-guarded two-phase rule, after Kawaguchi & Sun 2021, Algorithm 1 (2104.05785).

    Phase 1 trains everything by the module's own optimizer. At tau Gaussian noise is added to the trunk, and the rank of
    [h, 1] (last hidden features of the whole training set in eval mode, and the bias column if a bias is trained) is
    certified in float64. If it is n, phase 2 begins: only the last linear layer learns, by the same optimizer. For a loss
    that is convex in the outputs this problem is convex, and its infimum is the global infimum of the training loss over
    all weights. The trunk is then bit for bit constant - no gradients, the whole module in eval mode - and is not
    back-propagated through. What limits the argument in a run (random inputs, weight decay on the head, samples left out)
    is warned of and written into the reason. Afterwards, also after an error, the module is trainable again.

    Logged, to every logger and to ``trainer.callback_metrics``:

    - ``guard/phase`` (also ``convergence/phase``): 1 or 2, at the start, the switch and the end of every epoch
    - ``guard/rank``, ``guard/samples``: certified rank of [h, 1] and n; ``guard/sigma_min`` with ``_lower``: n-th
      singular value
    - ``guard/noise``: relative norm of the perturbation
    - ``guard/loss``: mean loss on the whole training set in eval mode, at the switch and at the end of every phase-2
      epoch
    - ``guard/gap`` (also ``convergence/gap``): ``guard/loss`` minus the loss's global infimum
    - text ``guard/reason`` (TensorBoard): what was decided and why

    Args:
        switch_at: tau, a share of the run in (0, 1) or a number of optimizer steps.
        head: dotted name of the last linear layer; None: it is found.
        noise_scale: standard deviation of the noise, relative to each tensor's root mean square.
        on_undecided: if the condition is not certified: ``"warn"``: take the noise back, warn, and go on training
            everything. ``"raise"``: stop with ``ExpressivityError``. ``"continue"``: enter phase 2 without the
            guarantee.
        seed: of the noise.
        loss_fn: ``loss_fn(outputs, targets)`` of the training step, for the gap; None: the one loss module on the
            LightningModule.
        infimum: of the mean loss over all outputs; None: 0 for the usual losses with hard targets, else the gap is not
            logged.
        input_fn: takes the model's input out of a batch, see ``Probe``.
        target_fn: takes the targets out of a batch; default ``batch[1]`` or the keys y, target(s), label(s).
        forward_fn: ``forward_fn(module, inputs)`` gives the outputs; default ``module(inputs)``.

    Attributes:
        phase: 1 or 2.
        reason: why it is in this phase.
        certificate: the ``RankCertificate``, once taken.
        history: loss and gap on the training set, by step and epoch.

    Raises:
        MisconfigurationException: several optimizers, manual optimization, several devices, weight averaging, an endless
            run with a share for ``switch_at``, no usable linear head, a network that cannot be called, bad arguments.
        ExpressivityError: not certified, with ``on_undecided="raise"``.

    Cost: once, two passes over the training set and one SVD of n x (m_H + 1); one pass per phase-2 epoch. A phase-2 step is
    cheaper than a phase-1 step: it has no backward pass through the trunk.

    Example::

        trainer = Trainer(max_epochs=50, callbacks=[ExpressivityGuard(switch_at=0.6)])
    """

    def __init__(
        self,
        switch_at: int | float = 0.6,
        head: str | None = None,
        noise_scale: float = 1e-3,
        on_undecided: OnUndecided = "warn",
        seed: int = 0,
        loss_fn: LossFn | None = None,
        infimum: float | None = None,
        input_fn: InputFn | None = None,
        target_fn: TargetFn | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        share = isinstance(switch_at, float)
        if isinstance(switch_at, bool) or (share and not 0 < switch_at < 1) or (not share and switch_at < 0):
            raise MisconfigurationException(
                f"switch_at: {switch_at!r}; need a share of the run in (0, 1), or a number of optimizer steps (an int, 0 or more)"
            )
        if not 0 < noise_scale < math.inf:
            raise MisconfigurationException(f"noise_scale: {noise_scale}; need a positive number, such as 1e-3")
        if on_undecided not in get_args(OnUndecided):
            raise MisconfigurationException(
                f"on_undecided: {on_undecided!r} is not one of {', '.join(get_args(OnUndecided))}"
            )
        self.switch_at = switch_at
        self.head = head
        self.noise_scale = noise_scale
        self.on_undecided = on_undecided
        self.seed = seed
        self.loss_fn = loss_fn
        self.infimum = infimum
        self.input_fn = input_fn
        self.target_fn = target_fn
        self.forward_fn = forward_fn
        self._begin(GuardState())

    def _begin(self, state: GuardState) -> None:
        self._state = state
        self._head: Head | None = None
        self._data: TrainingSet | None = None
        self._loss: TrainingLoss | None = None
        self._caveats: list[str] = []
        self._trunk: FrozenTrunk | None = None
        self._logged_step: int | None = None

    @property
    def phase(self) -> int:
        """1: everything is trained; 2: the head only."""
        return self._state.phase

    @property
    def reason(self) -> str:
        """Why the run is in this phase."""
        return self._state.reason

    @property
    def certificate(self) -> RankCertificate | None:
        """The certificate of the switch, once taken."""
        return self._state.certificate

    @property
    def perturbation(self) -> Perturbation | None:
        """The noise of the switch, once added."""
        return self._state.perturbation

    @property
    def history(self) -> list[dict[str, float]]:
        """Loss and gap on the training set, by step and epoch."""
        return self._state.history

    @property
    def head_name(self) -> str | None:
        """Dotted name of the last linear layer, once it is known."""
        if self._head is None:
            return self.head
        return self._head.name if self.forward_fn is None else self._head.name.removeprefix("module.")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise MisconfigurationException(
                f"ExpressivityGuard: {type(trainer.strategy).__name__} on {trainer.world_size} devices; freezing the trunk in mid-run "
                "works on a single device only: use Trainer(devices=1)"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "ExpressivityGuard: the module optimizes manually, so it may step what is frozen; use automatic optimization"
            )
        averaging = [c for c in trainer.callbacks if isinstance(c, (StochasticWeightAveraging, WeightAveraging))]  # type: ignore[attr-defined]
        if averaging:
            raise MisconfigurationException(
                f"ExpressivityGuard: {type(averaging[0]).__name__} replaces the trunk by an average over both phases, which no "
                "certificate is about; remove one of the two"
            )
        warn_without_logger(trainer, self, "phase, rank and gap")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step < self._state.last_step:
            self._begin(GuardState())  # used for another run
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"ExpressivityGuard: {len(trainer.optimizers)} optimizers; the two-phase rule is for one"
            )
        self._data = TrainingSet(trainer, self.input_fn)
        self._head = self._find_head(trainer, pl_module)
        self._trunk = FrozenTrunk(pl_module, self._head)
        if self.phase == 2 and trainer.global_step == 0 and self._trunk.moved_since(self._state.fingerprints):
            self._state = GuardState()  # it was the memory of another run, which ended in its first step
        # In phase 1 the present settings count, also for a resumed run that is to be longer.
        self._state.switch_step = self._resolve_switch(trainer) if self.phase == 1 else self._state.switch_step
        # What the head's result goes through is not checked, so the infimum of the whole is not known.
        known = self._head.last or self.infimum is not None
        self._loss = TrainingLoss(pl_module, self.loss_fn, self.infimum if known else math.nan, self.target_fn)
        self._caveats = find_caveats(trainer, self._data, self._head)
        if self._caveats:
            rank_zero_warn(f"ExpressivityGuard: the guarantee is limited: {'; '.join(self._caveats)}")
        log_layout(trainer)
        if self.phase == 2:
            self._warn_if_moved(trainer)
            self._trunk.freeze()
            publish(trainer, self._state.metrics(self.history[-1]["step"] if self.history else trainer.global_step))
        elif not self._state.declined:
            self._start_phase_one(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trunk is not None and self.phase == 2:
            self._trunk.keep_still()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._trunk is not None and self.phase == 2:
            self._trunk.keep_still()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._active:
            return
        self._state.last_step = trainer.global_step
        assert self._state.switch_step is not None
        if self.phase == 1 and not self._state.declined and trainer.global_step >= self._state.switch_step:
            self._switch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active or self._logged_step == trainer.global_step:  # a switch in the last step has logged it all
            return
        if self.phase == 2:
            self._measure_loss(trainer, pl_module)
        self._log(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        if self.phase == 2:
            self._warn_if_moved(trainer)
        elif not self._state.declined:
            self._state.reason = (
                f"the run ended at step {trainer.global_step}, before the switch at {self._state.switch_step}"
            )
            rank_zero_warn(f"ExpressivityGuard: {self.reason}; nothing was certified")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()  # Lightning skips teardown then

    def _release(self) -> None:
        if self._trunk is not None:
            self._trunk.release()
        self._trunk = self._data = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._state.as_plain()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begin(GuardState.from_plain(state_dict))

    @property
    def _active(self) -> bool:
        return self._head is not None and self._data is not None

    def _network(self, pl_module: pl.LightningModule) -> nn.Module:
        return called_by(pl_module, self.forward_fn)

    def _qualified(self, name: str | None) -> str | None:
        return name if name is None or self.forward_fn is None else f"module.{name}"

    def _find_head(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Head:
        assert self._data is not None
        try:
            head = find_head(self._network(pl_module), self._data.first_inputs(), self._qualified(self.head))
        except ValueError as error:
            raise MisconfigurationException(f"ExpressivityGuard: {error}") from error
        except (TypeError, NotImplementedError) as error:
            raise MisconfigurationException(f"ExpressivityGuard: {cannot_call(pl_module, error)}") from error
        optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        if not head.module.weight.requires_grad or id(head.module.weight) not in optimized:
            raise MisconfigurationException(
                f"head: {head.name!r} is frozen or not in the optimizer, so phase 2 would train nothing; let the optimizer have it"
            )
        return head

    def _resolve_switch(self, trainer: pl.Trainer) -> int:
        total = trainer.estimated_stepping_batches
        if isinstance(self.switch_at, int):
            if self.switch_at >= total:
                rank_zero_warn(
                    f"switch_at: step {self.switch_at} is not before the run's last, {total}; nothing will be certified"
                )
            return self.switch_at
        if not math.isfinite(total) or total < 1:
            raise MisconfigurationException(
                f"switch_at: {self.switch_at} is a share of the run, but its length is not known; set max_epochs or max_steps, or pass a "
                "number of optimizer steps"
            )
        return min(math.ceil(self.switch_at * total), max(int(total) - 1, 0))

    def _start_phase_one(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._head is not None
        assert self._data is not None
        rank_zero_info(
            f'ExpressivityGuard: head "{self.head_name}" (m_H = {self._head.width}), n = {self._data.size}, switch after step '
            f"{self._state.switch_step}"
        )
        # Said at the start of a run, not after most of it.
        if (narrow := too_narrow(self._data.size, self._head.width, bias=self._head.has_bias)) is not None:
            self._undecided(narrow)
        self._log(trainer)
        if not self._state.declined and trainer.global_step >= (self._state.switch_step or 0):
            self._switch(trainer, pl_module)

    def _undecided(self, reason: str) -> None:
        """Follow ``on_undecided``; returns only if the run goes on."""
        self._state.reason = reason
        if self.on_undecided == "raise":
            raise ExpressivityError(f"ExpressivityGuard: {reason}")
        if self.on_undecided == "warn":
            self._state.declined = True
            rank_zero_warn(f"ExpressivityGuard: {reason}. Training of all layers goes on, without the guarantee")

    def _switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._head is not None
        assert self._data is not None
        assert self._trunk is not None
        trunk = self._trunk.trainable
        before = {name: p.detach().clone() for name, p in trunk.items()}
        if trunk:
            self._state.perturbation = perturb(trunk, self.noise_scale, self.seed)
        rank_zero_info(
            f"ExpressivityGuard: certifying the rank of [h, 1], {self._data.size} x {self._head.width + 1}, at step {trainer.global_step}"
        )
        reason = self._certify(pl_module)
        if not self._state.certified and self.on_undecided != "continue":
            with torch.no_grad():
                for name, parameter in trunk.items():
                    parameter.copy_(before[name])
            self._state.perturbation = None
            self._log(trainer)
            log_text(trainer, "guard/reason", f"phase 1 goes on: {reason}", trainer.global_step)
            self._undecided(reason)
            return
        certified = f"rank [h, 1] = n = {self._data.size} is certified"
        claim = certified if self._state.certified else "NOT certified, on_undecided='continue'"
        self._state.phase = 2
        self._state.reason = "; ".join([f"switched at step {trainer.global_step}: {claim}", reason, *self._caveats])
        rank_zero_info(f"ExpressivityGuard: {self.reason}")
        log_text(trainer, "guard/reason", self._state.report(str(self.head_name)), trainer.global_step)
        self._trunk.freeze()
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                # Its curvature pairs span all parameters at once and would move the trunk along old directions.
                optimizer.state.clear()
        self._state.fingerprints = self._trunk.fingerprints()
        self._measure_loss(trainer, pl_module)
        self._log(trainer)

    def _certify(self, pl_module: pl.LightningModule) -> str:
        """Take the certificate; whatever goes wrong leaves the condition undecided rather than ending the run."""
        assert self._head is not None
        assert self._data is not None
        data, head, network = self._data, self._head, self._network(pl_module)
        try:
            self._state.certificate = certify_trunk(data, network, head)
        except Exception as error:  # whatever it is, the run goes on without the guarantee
            return f"no certificate could be computed ({type(error).__name__}: {error})"
        return self._state.certificate.reason

    def _warn_if_moved(self, trainer: pl.Trainer) -> None:
        assert self._trunk is not None
        if moved := self._trunk.moved_since(self._state.fingerprints):
            self._state.reason = f"the trunk moved during phase 2 ({', '.join(moved)}), so the guarantee is void"
            rank_zero_warn(f"ExpressivityGuard: {self.reason}")
            log_text(trainer, "guard/reason", self.reason, trainer.global_step)

    def _measure_loss(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._data is not None
        assert self._loss is not None
        try:
            measured = self._loss.measure(self._network(pl_module), self._data)
        except Exception as error:  # a figure for the log must not end a training run
            rank_zero_warn(f"ExpressivityGuard: no training loss at step {trainer.global_step}: {error}")
            return
        if measured:
            place = {"step": float(trainer.global_step), "epoch": float(trainer.current_epoch)}
            self.history.append(place | measured)

    def _log(self, trainer: pl.Trainer) -> None:
        log_metrics(trainer, self._state.metrics(trainer.global_step), trainer.global_step)
        self._logged_step = trainer.global_step
