"""``LinearisedRun``: a run on the squared loss beside its linearisation: the observed steps, their rate, and the curve from the start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_conv.callbacks.criteria.measured import Measured
from lightning_conv.callbacks.criteria.observer import Observer
from lightning_conv.callbacks.criteria.papers.du_projection import LabelProjection
from lightning_conv.callbacks.criteria.papers.du_steps import LinearisedSteps
from lightning_conv.callbacks.run.assumptions import EVERYWHERE, Breach, Hypothesis, breached
from lightning_conv.callbacks.run.measurement import ProbeKernel
from lightning_conv.kernels.contraction import is_full
from lightning_conv.losses.scale import LossScale
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.tools.observation import Observation

ON_THE_PROBE: frozenset[Hypothesis] = EVERYWHERE | {"full batch", "whole set", "squared loss"}
"""Where all of these hold, a step is one of gradient descent on the probe's squared loss."""


class LinearisedRun:
    """Follows one run; all of it needs the full kernel.

    Args:
        observer: of the steps.
        measured: kernels.
    """

    def __init__(self, observer: Observer, measured: Measured) -> None:
        self._observer, self._measured = observer, measured
        self._steps = LinearisedSteps()
        self.projection = LabelProjection()
        """Of the error on the first kernel's eigenvectors."""

    def note(
        self, trainer: pl.Trainer, kernel: ProbeKernel, scale: LossScale | None, breaches: Sequence[Breach]
    ) -> None:
        """After an observation: the error, what the first kernel foretells of it, and what the step to come is compared with.

        Args:
            trainer: of the run.
            kernel: of the probe.
            scale: of a squared loss on the probe, or None.
            breaches: hypotheses that do not hold now.
        """
        last = self._observer.history[-1]
        self._steps.forget()
        if scale is None or math.isnan(last.loss):
            return
        try:
            self.wait(trainer, kernel, scale, breaches)
            if breached(breaches, ON_THE_PROBE):
                self.projection.stop()
            elif not self.projection.begun:
                self._begin(trainer, kernel, scale.k, last.step)
            self.projection.measure(last.step, math.sqrt(2 * max(last.loss, 0.0) / scale.k))
        except Exception as error:
            self.projection.stop()
            rank_zero_warn(f"ConvergenceCriteria: the linearised error is left out at step {last.step}: {error}")

    def wait(
        self, trainer: pl.Trainer, kernel: ProbeKernel, scale: LossScale | None, breaches: Sequence[Breach]
    ) -> None:
        """Keep the outputs for the step to come, if it is to be compared; arguments as in ``note``. Clipped steps are."""
        self._steps.forget()
        gram, spectrum = self._measured.gram, self._measured.spectrum
        if scale is None or gram is None or spectrum is None or not is_full(gram) or self._observer.pending is None:
            return
        if not breached(breaches, ON_THE_PROBE - {"unclipped"}):
            self._steps.wait(self._observer.exact_outputs(trainer.lightning_module, kernel), gram, spectrum)

    def _begin(self, trainer: pl.Trainer, kernel: ProbeKernel, k: float, step: int) -> None:
        gram, targets = self._measured.gram, kernel.targets
        if gram is None or targets is None or not is_full(gram):
            self.projection.stop()
            return
        outputs = self._observer.exact_outputs(trainer.lightning_module, kernel).cpu()
        y = targets.cpu().double().reshape(outputs.shape)
        self.projection.begin(gram, outputs - y, y, k, step)

    def note_step(self, rate: float) -> None:
        """Before an optimizer step.

        Args:
            rate: of plain descent on the run's loss; NaN: it is none.
        """
        self.projection.note_step(rate)

    def observe_step(self, trainer: pl.Trainer, kernel: ProbeKernel, scale: LossScale | None) -> None:
        """After a step that the observer has seen; arguments as in ``note``."""
        seen = self._observer.history[-1]
        if not self._steps.waits or scale is None or kernel.targets is None:
            return
        try:
            outputs = self._observer.exact_outputs(trainer.lightning_module, kernel)
            lambda_0 = self._measured.lambda_0 if self._measured.du.deep else None
            self._steps.observe(outputs, kernel.targets, seen, scale.step_on_sum(seen.step_size), lambda_0)
        except Exception as error:
            self._steps.forget()
            rank_zero_warn(f"ConvergenceCriteria: the step after step {seen.step} is not linearised: {error}")

    @property
    def criteria(self) -> list[Criterion]:
        """Lemmas B.6 and B.7, of the deep networks of Du et al."""
        return self._steps.criteria() if self._measured.du.deep else []

    def quantities(self, scale: LossScale | None) -> dict[str, float]:
        """The scalars of the last observation.

        Args:
            scale: of a squared loss on the probe, or None.
        """
        found = self._steps.quantities() | self.projection.quantities()
        history = self._observer.history
        return found if scale is None or not history else found | self._rate_ends(history[-1], scale)

    def _rate_ends(self, seen: Observation, scale: LossScale) -> dict[str, float]:
        """2 eta lambda_min(G) and 2 eta lambda_max(G), between which the linearised rate lies."""
        gram, spectrum, eta = self._measured.gram, self._measured.spectrum, scale.step_on_sum(seen.step_size)
        if gram is None or spectrum is None or not is_full(gram) or math.isnan(eta):
            return {}
        least, greatest = max(spectrum.lambda_min.lower, 0.0), spectrum.lambda_max.upper
        return {"rate_linearised_least": 2 * eta * least, "rate_linearised_greatest": 2 * eta * greatest}

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {"steps": self._steps.state_dict(), "projection": self.projection.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self._steps.load_state_dict(state.get("steps", {}))
        if "projection" in state:
            self.projection.load_state_dict(state["projection"])
        elif self._observer.started:  # an older version did not store it: the steps before are not known
            self.projection.stop()
