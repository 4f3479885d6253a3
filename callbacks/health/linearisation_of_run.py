"""``LinearisationOfRun``: the weights of the start of one run, the error of the network linearised there, and the regime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.health.search_along import TOO_LARGE, fits_in_memory
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_course import finding_of_regime, regime_numbers
from lightning_conv.health.kernel.linearisation import Linearisation, linearisation_error
from lightning_conv.health.kernel.regime import training_regime
from lightning_conv.health.step.course import LossCourse
from lightning_conv.kernels.drift import Drift

STORED = 2**20
"""Weights up to which those of the start are in the checkpoint: 4 MiB in float32."""

TOLD = 0.01
"""Share of the outputs' movement that rounding may explain before the network is evaluated in float64."""


class LinearisationOfRun:
    """Follows one run.

    Attributes:
        error: The error at the last measurement; NaN: it was known before, and not then; None: it never was.
    """

    def __init__(self) -> None:
        self.error: float | None = None
        self.regime_undecided = ""  # why it is
        self._start: dict[str, Tensor] = {}  # weights at the first measurement, by name
        self._step: int | None = None  # of them
        self._lost = ""  # why there are none

    def clear(self) -> None:
        """Forget the number of the last measurement, before another one."""
        self.error = None if self.error is None else math.nan

    def begins(self, run: RunView, drift: Drift) -> bool:
        """Return whether the weights of now are those of the start, which are then kept.

        Args:
            run: The run at this moment.
            drift: How the kernel differs from that of the start: not at all, if this is the start.
        """
        if self._step is None and drift.relative_frobenius == 0:
            weights = run.parameters
            self._step = run.step
            if any(each.is_complex() for each in weights.values()):
                self._lost = "some weights are complex"
            elif not fits_in_memory(run, weights):
                self._lost = TOO_LARGE
            else:
                self._start = {name: each.detach().clone() for name, each in weights.items()}
        return self._step == run.step

    def measure(self, run: RunView) -> str:
        """Measure the error of the network linearised at the start, at the weights of now.

        The network takes BatchNorm as a training step does where the probe takes it with its own statistics. The passes are in the type of
        the network, and again in float64 where rounding could decide.

        Args:
            run: The run at this moment.

        Returns:
            Why nothing was found; empty if something was.

        Cost: about nine forward passes of the probe and a forward derivative, twice if need be; copies of the weights.
        """
        if not self._start:
            return self._lost or "the weights of the start are not known"
        named = run.parameters_of_network
        others = [name for name, each in named.items() if each.requires_grad and name not in self._start]
        if others and len(run.trainer.optimizers) == 1:
            return f"weights are trained that the kernel of the start is not over ({others[0]})"
        if not fits_in_memory(run, self._start):
            return TOO_LARGE
        if not all(bool(named[name].detach().isfinite().all()) for name in self._start):
            return "weights are not finite"
        try:
            found = self._look(run, None)
            if found.rounding > TOLD:
                found = self._look(run, torch.float64)
        except MemoryError as error:
            return str(error)
        if math.isnan(found.error) or found.rounding > TOLD:
            return "the outputs have hardly moved since the start"
        self.error = found.error
        return ""

    def _look(self, run: RunView, dtype: torch.dtype | None) -> Linearisation:
        with isolated():
            return linearisation_error(
                run.network,
                run.inputs,
                self._start,
                batch_norm=run.step_batch_norm,
                dtype=dtype,
                max_memory=run.measurement.probe.max_memory,
            )

    def regime(self, drift: Drift | None, course: LossCourse | None, step: int) -> Finding | None:
        """Judge whether the run is lazy or learns features; None: it is undecided, or start, kernel or loss are not known.

        Where it is undecided, ``regime_undecided`` says why.

        Args:
            drift: How the kernel differs from that of the start; None: not known.
            course: The losses of the probe; None: not known.
            step: Step of the measurement.
        """
        self.regime_undecided = ""
        if drift is None or course is None or step == 0 or not course.now > 0:
            return None
        error = None if self.error is None or math.isnan(self.error) else self.error
        progress = course.first / course.now
        found = training_regime(drift.alignment, drift.relative_frobenius, error, progress=progress, floor=drift.floor)
        self.regime_undecided = ""
        if found.regime == "undecided":
            beyond = ", beyond the limits of a lazy run" if found.beyond_lazy else ""
            self.regime_undecided = f"{found.reason}; {regime_numbers(found)}{beyond}"
        return finding_of_regime(found, step=step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types and tensors: the weights of the start, if they are few."""
        small = sum(each.numel() for each in self._start.values()) <= STORED
        lost = self._lost if small else f"the checkpoint has no weights of the start, as they are more than {STORED:,}"
        start = {name: each.cpu() for name, each in self._start.items()} if small else {}
        return {"error": self.error, "step": self._step, "lost": lost, "start": start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.error, self._step, self._lost = state["error"], state["step"], state["lost"]
        self._start = dict(state["start"])
