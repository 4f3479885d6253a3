"""``RegularizedGradientClipping``: delta-GClip, clipping with a floor that keeps a rate of convergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks.run.logging import log_metrics
from lightning_conv.callbacks.run.run_log import LogsOfRun
from lightning_conv.callbacks.run.steps import ChangesSteps, describe_optimizer
from lightning_conv.theory.papers.clipping import clipping_factor, clipping_regime, require_clipping


class RegularizedGradientClipping(ChangesSteps, LogsOfRun):
    """Scales the gradient by min(1, max(delta, gamma / |grad f|)) before every optimizer step.

    With plain SGD of learning rate eta this is delta-GClip (Tucat, Mukherjee, Sen, Sun & Rivasplata 2025): the step
    h = eta min(1, max(delta, gamma / |grad f|)) lies in [eta delta, eta], and where f >= 0 is beta-smooth with
    |grad f|^2 >= mu f and eta <= 1 / beta, full-batch steps give f_t <= (1 - eta delta mu / 2)^t f_0. Trainer(gradient_clip_val=gamma)
    is the case delta = 0, whose step has no positive lower bound. With another optimizer the gradient is scaled all the same, which the
    theory does not cover (a warning says so).

    The norm is that of all parameters of the optimizer together, taken after gradient accumulation, after the gradients of all
    processes have been averaged, and after the scaling of mixed precision has been undone. A gradient that is not finite is left as it
    is, so that the scaler skips it or the user sees it.

    Logged every ``log_every_n_steps`` of the Trainer, to every logger and to ``trainer.callback_metrics``:

    - ``clipping/gradient_norm``: |grad f| before clipping, of the step just taken
    - ``clipping/factor``: h / eta; with plain SGD also ``clipping/step_size``: h
    - ``clipping/share_full``, ``clipping/share_clipped``, ``clipping/share_floor``: of the finite gradients since the start

    Args:
        gamma: threshold of the norm, in units of the gradient.
        delta: floor of the factor, in [0, 1].

    Raises:
        MisconfigurationException: gamma or delta out of range; ``Trainer(gradient_clip_val=...)``, a
            ``configure_gradient_clipping`` defined by the module, since both would clip; manual optimization; sharded strategies; an
            optimizer that undoes the scaling of mixed precision by itself.

    Cost: one norm of the gradient and one synchronisation with the device per step.

    Example::

        trainer = Trainer(callbacks=[RegularizedGradientClipping(gamma=1.0, delta=0.1)])
    """

    def __init__(self, gamma: float, delta: float = 0.1) -> None:
        try:
            require_clipping(gamma, delta)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"RegularizedGradientClipping: {error}") from error
        self.gamma = float(gamma)
        self.delta = float(delta)
        self._counts = {"full": 0, "clipped": 0, "floor": 0}
        self._last: dict[str, float] = {}
        self._logged: int | None = None
        self._loaded = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if why := self._refused(trainer, pl_module):
            raise MisconfigurationException(f"RegularizedGradientClipping: {why}")

    def _refused(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Return the reason why the gradients of this run cannot be clipped, or an empty string."""
        if not pl_module.automatic_optimization:
            return (
                "the module optimizes manually, so no hook stands before its steps; scale the gradients in training_step by "
                "lightning_conv.theory.papers.clipping.clipping_factor"
            )
        if trainer.gradient_clip_val:
            return f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips as well; remove one of the two"
        if is_overridden("configure_gradient_clipping", pl_module):
            return "the module has its own configure_gradient_clipping; remove one of the two"
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            return (
                f"{type(trainer.strategy).__name__} shards the gradients, and no process has the norm of all of them; use a single "
                "device or DDP"
            )
        return ""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_log(trainer)
        # A new fit starts new counts; a resumed one keeps those of its checkpoint.
        if not self._loaded and (trainer.global_step == 0 or trainer.ckpt_path is not None):
            self._counts, self._last = {"full": 0, "clipped": 0, "floor": 0}, {}
        self._loaded, self._logged = False, None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for optimizer in trainer.optimizers:
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise MisconfigurationException(
                    f"RegularizedGradientClipping: {type(optimizer).__name__}(fused=True) undoes the scaling of mixed precision "
                    "inside its step, so the gradient before it is not the true one; use fused=False"
                )
        reasons = [reason for optimizer in trainer.optimizers if (reason := describe_optimizer(optimizer).reason)]
        if reasons:
            rank_zero_warn(
                f"RegularizedGradientClipping: {reasons[0]}; the gradients are clipped all the same, but the rate of convergence is "
                "that of plain SGD with one learning rate"
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = gradients_of(optimizer)
        if not gradients:
            return
        norm = float(total_norm(gradients))
        if not math.isfinite(norm):
            return
        factor = clipping_factor(norm, gamma=self.gamma, delta=self.delta)
        self._counts[clipping_regime(norm, gamma=self.gamma, delta=self.delta)] += 1
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)
        self._last = {"clipping/gradient_norm": norm, "clipping/factor": factor}
        if (rate := describe_optimizer(optimizer).rate) is not None:
            self._last["clipping/step_size"] = factor * rate

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:  # 0: never, as in Trainer(barebones=True)
            self._log(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.end_log(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.end_log(trainer, pl_module, succeeded=False)

    def _log(self, trainer: pl.Trainer) -> None:
        # Under gradient accumulation several batches share one step.
        if self._last and trainer.global_step != self._logged:
            self._logged = trainer.global_step
            log_metrics(trainer, self.metrics, trainer.global_step)

    @property
    def metrics(self) -> dict[str, float]:
        """The logged values: of the last step, and the shares of the regimes since the start."""
        steps = max(sum(self._counts.values()), 1)
        return self._last | {f"clipping/share_{regime}": count / steps for regime, count in self._counts.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self._counts), "last": dict(self._last)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts = {regime: int(state_dict.get("counts", {}).get(regime, 0)) for regime in self._counts}
        self._last, self._loaded = dict(state_dict.get("last", {})), True


def gradients_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return all gradients that the optimizer's next step will use."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


WIDE = (torch.float32, torch.float64)


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the Euclidean norm of all gradients together, on the device of the first one, without waiting for it.

    It is computed at least in float32, because squares of half-precision numbers overflow early.
    """
    device = gradients[0].device
    dtype = gradients[0].dtype
    if dtype in WIDE and all(g.dtype == dtype and g.device == device and not g.is_sparse for g in gradients):
        at_once: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tuple(gradients))))
        return at_once.detach()
    norms = []
    for gradient in gradients:
        values = gradient.detach()
        values = values.coalesce().values() if values.is_sparse else values
        wide = torch.promote_types(values.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(values, dtype=wide).to(device))
    whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole
