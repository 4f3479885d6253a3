"""``LinearisedSteps``: how far the steps of a run are from linear ones, u(k+1) - u(k) = -eta G(k) r(k) (Du et al., Lemma B.6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_conv.callbacks.criteria.observer import FLOAT64_NOISE
from lightning_conv.callbacks.run.worst_step import Worst
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.papers.du import Linearisation, linearisation, linearisation_criteria
from lightning_conv.theory.papers.du.descent import ASKS_CHANGE, ASKS_REMAINDER
from lightning_conv.theory.papers.du.kernel import DEEP
from lightning_conv.theory.tools.observation import Observation

NOT_SEEN = (
    ("linearisation_remainder", f"{DEEP}, Lemma B.6", ASKS_REMAINDER),
    ("output_change", f"{DEEP}, Lemma B.7", ASKS_CHANGE),
)


@dataclass
class _Before:
    """What the step to come is compared with."""

    outputs: Tensor  # u(k), (n, C), float64
    gram: KernelGram
    largest: float  # lambda_max(G(k)), an upper bound


class LinearisedSteps:
    """Follows the observed steps of one run. Between a measurement and the step after it the outputs on the probe are kept, no more."""

    def __init__(self) -> None:
        self._before: _Before | None = None
        self._last: Linearisation | None = None
        self._worst = Worst({"linearisation_remainder": "greatest", "output_change": "greatest"})

    @property
    def waits(self) -> bool:
        """Whether the step to come will be compared."""
        return self._before is not None

    def begin(self) -> None:
        """Begin another measurement: no step is waited for."""
        self._before, self._last = None, None

    def measure(self, outputs: Tensor, gram: KernelGram, spectrum: Spectrum) -> None:
        """Keep what the step to come is compared with.

        Args:
            outputs: u(k) on the probe in float64, in the kernel's BatchNorm mode.
            gram: G(k), the full kernel.
            spectrum: of it.
        """
        self._before, self._last = _Before(outputs.cpu(), gram, spectrum.lambda_max.upper), None

    def observe(
        self, outputs: Tensor, targets: Tensor, seen: Observation, step: float, lambda_0: Bounded | None
    ) -> None:
        """Compare the step with a linear one; it is left out where its change is rounding, of the outputs, the kernel or the weights.

        Args:
            outputs: u(k+1).
            targets: y, as many numbers.
            seen: the observation of the step, plain descent on the probe.
            step: eta on S.
            lambda_0: of the limit kernel; None: there is none for the network, so there is no verdict.
        """
        before, self._before = self._before, None
        if before is None or math.isnan(step) or seen.departed:
            return
        u, after = before.outputs, outputs.cpu()
        y = targets.cpu().double().reshape(u.shape)
        noise = FLOAT64_NOISE * float(u.norm() + after.norm() + y.norm())
        if seen.departure > 0:  # weights that are off by this much move the outputs by at most |J|_2 times it
            noise += math.sqrt(max(before.largest, 0.0)) * seen.departure * seen.step_size * seen.gradient_norm
        found = linearisation(u, after, y, before.gram, step, rounding=noise)
        if not (found.resolved and math.isfinite(found.relative)):
            return
        self._last = found
        if lambda_0 is not None and lambda_0.value > 0:
            self._worst.note(linearisation_criteria(found, step, lambda_0), seen.step)

    def criteria(self) -> list[Criterion]:
        """Return Lemmas B.6 and B.7 at the step where each was worst; undecided where no step was compared."""
        return self._worst.criteria() or [at_most(*each, math.nan, math.nan) for each in NOT_SEEN]

    def quantities(self) -> dict[str, float]:
        """Return ``linearisation_error``: |u(k+1) - u(k) + eta G(k) r(k)| / (eta |G r|) of the last step."""
        return {} if self._last is None else {"linearisation_error": self._last.relative}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint; a step that is waited for is measured again."""
        return self._worst.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._worst.load_state_dict(state)
