"""``Observer``: the loss of a run on the probe, its gradient, and what the optimizer step after a measurement does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.clipping import RegularizedGradientClipping, gradients_of, total_norm
from lightning_conv.callbacks.run.assumptions import Breach
from lightning_conv.callbacks.run.batch import to_device
from lightning_conv.callbacks.run.deviation import step_departure
from lightning_conv.callbacks.run.loss import LossFn, find_loss
from lightning_conv.callbacks.run.measurement import ProbeKernel
from lightning_conv.callbacks.run.steps import NotPlainError, PlainDescent
from lightning_conv.callbacks.run.violations import facts_of
from lightning_conv.losses.gradient import SampleLoss, inner, norm, wide
from lightning_conv.networks.evaluation import sample_count
from lightning_conv.theory.papers.allen_zhu.semi_smoothness import step_size as largest_spectral_norm
from lightning_conv.theory.tools.observation import NOISE, Observation

FLOAT64_NOISE = 1e-14


@dataclass
class Pending:
    """An observation that waits for the step after it."""

    weights: dict[str, Tensor]  # a copy of w_t
    gradient: dict[str, Tensor]
    rate: float = math.nan  # of the step, noted just before it


class Observer:
    """Follows one run.

    Args:
        loss_fn: of the training step; None: the one loss module on the LightningModule.
        spectral: whether to take the spectral norms of the steps.
    """

    def __init__(self, loss_fn: LossFn | None, *, spectral: bool) -> None:
        self.history: list[Observation] = []
        """What was measured, in order."""
        self.pending: Pending | None = None
        self._loss_fn, self._spectral = loss_fn, spectral
        self._start: dict[str, Tensor] = {}
        self._path: Tensor | float = 0.0
        self._path_known = True
        self._infimum = 0.0
        self._descent: PlainDescent | None = None
        self.largest_rate = math.nan
        """Of all steps so far that were plain descent."""

    def begin(self) -> None:
        """Another run begins, or this one goes on: what is known of its optimizer is no longer so."""
        self._descent, self.pending = None, None

    @property
    def started(self) -> bool:
        """Whether the weights of the start are known."""
        return bool(self._start)

    @property
    def measured_loss(self) -> bool:
        """Whether the loss was measured once."""
        return any(not math.isnan(seen.loss) for seen in self.history)

    def loss(self, pl_module: pl.LightningModule) -> LossFn | nn.Module | None:
        """The loss of the training step, or None."""
        return self._loss_fn if self._loss_fn is not None else find_loss(pl_module)

    def note_infimum(self, pl_module: pl.LightningModule, kernel: ProbeKernel, outputs: Tensor) -> None:
        """Look up the infimum of the loss on the probe; 0 where it is not known."""
        loss_fn = self.loss(pl_module)
        facts = None if kernel.targets is None else facts_of(loss_fn, outputs, kernel.targets.to(outputs.device))
        scale = sample_count(kernel.inputs) if getattr(loss_fn, "reduction", "mean") == "sum" else 1
        self._infimum = 0.0 if facts is None else facts.infimum * scale

    @property
    def infimum(self) -> float:
        """Of the loss on the probe; 0 where it is not known."""
        return self._infimum

    @property
    def departed(self) -> Observation | None:
        """The first observed step that was no plain descent on f."""
        return next((seen for seen in self.history if seen.departed), None)

    def rate(self, trainer: pl.Trainer, kernel: ProbeKernel) -> float:
        """The step h of plain descent on f, before clipping: the learning rate, or its share where processes average their sums.

        Raises:
            NotPlainError: a step is something else.
        """
        return self._learning_rate(trainer, kernel) / self._parts(trainer)

    def _learning_rate(self, trainer: pl.Trainer, kernel: ProbeKernel) -> float:
        if self._descent is None:
            self._descent = PlainDescent(kernel.probe.network(trainer.lightning_module), kernel.parameters)
        return self._descent.rate(trainer, clipped=True)

    def _parts(self, trainer: pl.Trainer) -> int:
        """Of how many equal parts, a process each, the gradient is the mean where f is the sum over all of them."""
        summed = getattr(self.loss(trainer.lightning_module), "reduction", "mean") == "sum"
        return trainer.world_size if summed else 1

    def note_step(self, trainer: pl.Trainer, kernel: ProbeKernel, optimizer: Optimizer, callback: pl.Callback) -> float:
        """Before an optimizer step: its rate before clipping (NaN: no plain descent), and what it adds to the path, without waiting."""
        rate = math.nan
        try:
            learning_rate = self._learning_rate(trainer, kernel)
            rate = learning_rate / self._parts(trainer)
            self.largest_rate = rate if math.isnan(self.largest_rate) else max(rate, self.largest_rate)
            if self.pending is not None:
                self.pending.rate = rate
            clipping, order = find_clipping(trainer), trainer.callbacks  # type: ignore[attr-defined]
            if clipping is not None and order.index(clipping) > order.index(callback):
                raise NotPlainError("the gradients will be clipped after they were seen here")
            if self._path_known and (gradients := gradients_of(optimizer)):
                self._path = self._path + wide(learning_rate * total_norm(gradients))
        except NotPlainError:
            self._path_known = False
        return rate

    def observe(self, trainer: pl.Trainer, kernel: ProbeKernel, step: int, *, with_loss: bool) -> None:
        """Add an observation of the present weights, which waits for its step."""
        pl_module = trainer.lightning_module
        try:  # before the first step nothing has shown yet whether the steps are plain ones
            self.rate(trainer, kernel)
        except NotPlainError:
            self._path_known = False
        parameters = _parameters(pl_module, kernel)
        if not self._start:
            self._start = {name: value.detach().clone() for name, value in parameters.items()}
        moved = {name: value.detach() - self._start[name].to(value) for name, value in parameters.items()}
        self.pending = None
        loss, slope = math.nan, math.nan
        if with_loss:
            loss, slope = self.wait(pl_module, kernel)
        exact = next(pl_module.parameters()).dtype == torch.float64
        path = float(self._path) if self._path_known else math.nan
        noise = FLOAT64_NOISE if exact else NOISE / 10
        self.history.append(Observation(step, loss, slope, norm(moved), path, noise=noise))

    def wait(self, pl_module: pl.LightningModule, kernel: ProbeKernel) -> tuple[float, float]:
        """Measure loss and gradient, keep them and the weights for the step to come; returns the loss and the gradient's norm."""
        loss, gradient = self._sample_loss(pl_module, kernel).gradient(kernel.parameters)
        weights = {name: value.detach().clone() for name, value in _parameters(pl_module, kernel).items()}
        self.pending = Pending(weights, gradient)
        return loss - self._infimum, norm(gradient)

    def observe_step(self, trainer: pl.Trainer, kernel: ProbeKernel, *, compared: bool) -> bool:
        """After the step that the last observation waited for: what it did. False if another one was done meanwhile.

        Args:
            trainer: of the run.
            kernel: of the probe.
            compared: whether the step should be -h grad f with f as it is on the probe, so that a difference can be told.
        """
        seen, pending, self.pending = self.history[-1], self.pending, None
        if pending is None or trainer.global_step != seen.step + 1:
            return False
        pl_module, clipping = trainer.lightning_module, find_clipping(trainer)
        parameters = _parameters(pl_module, kernel)
        moved = {name: parameters[name].detach() - before for name, before in pending.weights.items()}
        factor = 1.0 if clipping is None else clipping.metrics.get("clipping/factor", math.nan)
        step = pending.rate * factor
        departure = rounding = math.nan
        if compared:
            departure, rounding = step_departure(
                moved, pending.weights, pending.gradient, step,
                lambda dtype: self._sample_loss(pl_module, kernel, dtype=dtype).gradient(kernel.parameters, at=pending.weights)[1],
            )  # fmt: skip
        self.history[-1] = replace(
            seen,
            departure=departure,
            rounding=rounding,
            next_loss=self._sample_loss(pl_module, kernel).value() - self._infimum,
            linear=inner(pending.gradient, moved),
            moved=norm(moved),
            spectral=largest_spectral_norm(moved) if self._spectral else math.nan,
            step_size=step,
        )
        return True

    def exact_outputs(self, pl_module: pl.LightningModule, kernel: ProbeKernel) -> Tensor:
        """u on the probe in float64, in its BatchNorm mode. One forward pass, and for its time a copy of the weights in float64."""
        return self._sample_loss(pl_module, kernel, dtype=torch.float64).outputs()

    def weights_at_start(self, pl_module: pl.LightningModule, kernel: ProbeKernel) -> dict[str, Tensor]:
        """w_0; the present weights before the first observation."""
        return self._start or {name: value.detach() for name, value in _parameters(pl_module, kernel).items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {
            "history": [seen.state() for seen in self.history],
            "start": {name: value.cpu() for name, value in self._start.items()},
            "path": float(self._path),
            "path_known": self._path_known,
            "largest_rate": self.largest_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.history = [Observation.from_state(seen) for seen in state.get("history", [])]
        self._start = dict(state.get("start", {}))
        self._path, self._path_known = float(state.get("path", 0.0)), bool(state.get("path_known", True))
        self.largest_rate = float(state.get("largest_rate", math.nan))

    def _sample_loss(
        self, pl_module: pl.LightningModule, kernel: ProbeKernel, *, dtype: torch.dtype | None = None
    ) -> SampleLoss:
        loss_fn = self.loss(pl_module)
        assert loss_fn is not None
        assert kernel.targets is not None
        inputs, probe = to_device(kernel.inputs, pl_module.device), kernel.probe
        return SampleLoss(
            probe.network(pl_module), inputs, kernel.targets, loss_fn, batch_norm=probe.batch_norm, dtype=dtype
        )


def find_clipping(trainer: pl.Trainer) -> RegularizedGradientClipping | None:
    """The run's ``RegularizedGradientClipping``, or None."""
    found = [c for c in trainer.callbacks if isinstance(c, RegularizedGradientClipping)]  # type: ignore[attr-defined]
    return found[0] if found else None


def optimizer_breaches(observer: Observer, trainer: pl.Trainer, kernel: ProbeKernel) -> list[Breach]:
    """What the optimizer's settings break, or a step that was observed; asked anew at every step, since settings may change."""
    try:
        observer.rate(trainer, kernel)
    except NotPlainError as error:
        return [Breach("descent", f"a step is no plain gradient descent: {error}")]
    found = []
    if (seen := observer.departed) is not None:
        why = (
            f"step {seen.step} differs from -h grad f, f the loss on the probe, by {seen.departure:.2g} of it, where rounding explains "
            f"{seen.rounding:.2g}: another loss, a further term in it, random numbers in the forward, or samples left out"
        )
        found.append(Breach("descent", why))
    if find_clipping(trainer) is not None:
        found.append(Breach("unclipped", "RegularizedGradientClipping scales the gradients"))
    return found


def _parameters(pl_module: pl.LightningModule, kernel: ProbeKernel) -> dict[str, nn.Parameter]:
    named = dict(kernel.probe.network(pl_module).named_parameters())
    return {name: named[name] for name in kernel.parameters}
