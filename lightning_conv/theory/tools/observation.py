r"""A run that is observed at some of its steps: the loss, its gradient, the effect of one step, and their consequences.

Notation: f is the run's loss on fixed samples minus its infimum, w_t the weights after t steps, h_t the step size of
plain descent.

- a_t = |grad f_t|^2 / f_t is the PL ratio. Its smallest value on the path is an *upper* bound of the infimum over any
  ball around it.
- e_t = (f_t - f_{t+1}) / (h_t |grad f_t|^2) is the descent efficiency: 1 for an infinitely small step, and at least
  1 - h_t beta / 2 for a beta-smooth f.
- rho_t = f_{t+1} - f_t - <grad f_t, w_{t+1} - w_t> is the semi-smoothness residual. 2 rho_t / |w_{t+1} - w_t|^2 is the
  mean curvature along the step. Plain descent is at the edge of stability where it reaches 2 / h_t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

NOISE = 1e-5
"""Relative change of the loss below which it is rounding error in a float32 network."""


@dataclass(frozen=True)
class Observation:
    """Measurements at one step. Fields about the step that follows are NaN if it was not observed."""

    step: int  # t, optimizer steps done
    loss: float  # f_t; above its infimum if that is known
    gradient_norm: float  # |grad f_t|
    distance: float  # |w_t - w_0|
    path_length: float = math.nan  # sum_{s < t} h_s |grad f_s|; NaN: not plain descent
    step_size: float = math.nan  # h_t
    next_loss: float = math.nan  # f_{t+1}
    linear: float = math.nan  # <grad f_t, w_{t+1} - w_t>
    moved: float = math.nan  # |w_{t+1} - w_t|
    spectral: float = math.nan  # max over the layers of |W_{t+1} - W_t|_2, spectral
    noise: float = NOISE  # of the loss, relative
    departure: float = math.nan
    """Deviation from the gradient step, |w_{t+1} - w_t + h_t grad f_t| / (h_t |grad f_t|); NaN: not known."""
    rounding: float = math.nan  # largest contribution of rounding to the deviation

    @property
    def departed(self) -> bool:
        """Whether the step certainly deviates from plain descent on f."""
        return self.departure > self.rounding

    @property
    def ratio(self) -> float:
        """a_t, in the units of the loss; infinite where f = 0."""
        return self.gradient_norm**2 / self.loss if self.loss > 0 else math.inf

    @property
    def resolved(self) -> bool:
        """Whether the expected change of the loss is well above its rounding error."""
        return abs(self.linear) > 100 * self.noise * self.loss

    @property
    def efficiency(self) -> float:
        """e_t of plain descent; NaN if the step is unknown or its effect is rounding error."""
        expected = self.step_size * self.gradient_norm**2
        return (self.loss - self.next_loss) / expected if expected > 0 and self.resolved else math.nan

    @property
    def curvature(self) -> float:
        """2 rho_t / |w_{t+1} - w_t|^2 of a step of any kind; NaN if it is rounding error."""
        residual = self.next_loss - self.loss - self.linear
        clear = abs(residual) > 10 * self.noise * max(self.loss, self.next_loss)
        return 2 * residual / self.moved**2 if self.moved > 0 and clear else math.nan

    @property
    def contraction(self) -> float:
        """f_{t+1} / f_t."""
        return self.next_loss / self.loss if self.loss > 0 else math.nan

    @property
    def rate(self) -> float:
        """1 - f_{t+1} / f_t, the share of the loss that the step removed; NaN if its effect is rounding error."""
        return 1 - self.contraction if self.resolved else math.nan

    @property
    def linearised_rate(self) -> float:
        """h_t a_t, the share of the loss that plain descent removes to first order (2 eta r^T G r / |r|^2 for S)."""
        return self.step_size * self.ratio

    def state(self) -> dict[str, float]:
        """Return the fields as plain numbers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> Observation:
        """Restore an observation from ``state``."""
        return cls(**{**state, "step": int(state["step"])})  # type: ignore[arg-type]


def infimum_of_ratios(history: Sequence[Observation]) -> float:
    """Return the smallest observed a_t, an upper bound of the infimum over every ball around the observed points."""
    return min((seen.ratio for seen in history), default=math.nan)


def every_step(history: Sequence[Observation]) -> bool:
    """Return whether every step between the first and the last observation was observed."""
    return all(later.step == earlier.step + 1 for earlier, later in pairwise(history))


def observed_metrics(history: Sequence[Observation]) -> dict[str, float]:
    """Return the finite scalars of the last observation by name, with the infimum of the ratios as ``pl_infimum``."""
    if not history:
        return {}
    last = history[-1]
    found = {"loss": last.loss, "gradient_norm": last.gradient_norm, "pl_ratio": last.ratio}
    found |= {"pl_infimum": infimum_of_ratios(history), "distance": last.distance, "path_length": last.path_length}
    found |= {"descent_efficiency": last.efficiency, "curvature": last.curvature, "contraction": last.contraction}
    found |= {"step_departure": last.departure, "rate": last.rate, "rate_linearised": last.linearised_rate}
    return {name: value for name, value in found.items() if math.isfinite(value)}
