"""The findings of `lightning-conv lab random_labels`: checks and rows of the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.recipes.lab.du.two_layer_run import Track
from lightning_conv.recipes.lab.report import Check

ARORA = "Arora, Du, Hu, Li, Wang 2019 (1901.08584)"


ZHANG = "Zhang, Bengio, Hardt, Recht, Vinyals 2017 (1611.03530)"


FACTOR = 1.5
"""Largest ratio of the measured and the predicted number of steps at which the prediction counts as right."""


SHARES = (0.5, 0.2, 0.1)
"""Shares of |y| at which the numbers of steps are compared."""


@dataclass(frozen=True)
class Fit:
    """One vector of labels, and the run that fits it."""

    labels: Tensor
    track: Track
    predicted: Tensor  # |y - u(k)| at every step
    shares: Tensor  # of |y|^2 on each eigenvector, descending eigenvalues
    measure: float  # ``generalisation_measure`` of the limit kernel and the labels
    test_error: float

    @property
    def distance(self) -> float:
        """Largest |measured - predicted| / |y| over all steps."""
        measured = torch.tensor(self.track.residuals, dtype=torch.float64)
        return float((measured - self.predicted).abs().max() / self.labels.norm())

    def steps_to(self, share: float, curve: Sequence[float]) -> int | None:
        """Return the first step at which a curve is at most that share of |y|; None if there is none."""
        target = share * float(self.labels.norm())
        return next((k for k, value in enumerate(curve) if value <= target), None)

    def paces(self) -> dict[float, tuple[int | None, int | None]]:
        """Return share of |y| -> (measured, predicted) number of steps to it; shares that neither curve reaches are left out."""
        curves = self.track.residuals, self.predicted.tolist()
        found = {share: (self.steps_to(share, curves[0]), self.steps_to(share, curves[1])) for share in SHARES}
        return {share: pair for share, pair in found.items() if pair != (None, None)}

    @property
    def factor(self) -> float:
        """Largest ratio of measured and predicted numbers of steps; a curve that ends too early counts with its end."""
        end = len(self.track.residuals)
        pairs = [(max(end if k is None else k, 1), max(end if p is None else p, 1)) for k, p in self.paces().values()]
        return max((max(k / p, p / k) for k, p in pairs), default=math.nan)


def row(name: str, fit: Fit) -> dict[str, object]:
    """Return the table row of one vector of labels: column -> value."""
    return {
        "labels": name,
        "steps": len(fit.track.residuals) - 1,
        "training error at the end": fit.track.wrong[-1] / len(fit.labels),
        "steps to |y| / 2, measured": fit.steps_to(0.5, fit.track.residuals),
        "steps to |y| / 2, predicted": fit.steps_to(0.5, fit.predicted.tolist()),
        "steps to |y| / 10, measured": fit.steps_to(0.1, fit.track.residuals),
        "steps to |y| / 10, predicted": fit.steps_to(0.1, fit.predicted.tolist()),
        "largest factor of the steps": fit.factor,
        "largest distance of the curves / |y|": fit.distance,
        "sqrt(2 y^T H_inf^-1 y / n)": fit.measure,
        "test error": fit.test_error,
        "patterns changed": fit.track.patterns,
    }


def checks_of(fits: dict[str, Fit]) -> list[Check]:
    """Check that both vectors of labels are fitted, at the predicted speed, and that random labels are harder."""
    true, random = fits["true"], fits["random"]
    checks = [
        Check(
            f"zero training error on {name} labels",
            ZHANG,
            fit.track.wrong[-1] == 0,
            f"{fit.track.wrong[-1]} of {len(fit.labels)} wrong after {len(fit.track.residuals) - 1:,} steps; "
            f"|u - y| = {fit.track.residuals[-1]:.3g}",
        )
        for name, fit in fits.items()
    ]
    checks += [
        Check(
            f"steps to {', '.join(f'{share:g}' for share in fit.paces())} |y| on {name} labels as predicted, within a factor {FACTOR:g}",
            f"{ARORA}, Theorem 4.1",
            fit.factor <= FACTOR,
            ", ".join(f"{k} for {p}" for k, p in fit.paces().values())
            + f"; largest distance of the curves {fit.distance:.4f} |y|",
        )
        for name, fit in fits.items()
    ]
    mid = min(len(true.track.residuals), len(random.track.residuals)) // 10
    slower = [fit.track.residuals[mid] / fit.track.residuals[0] for fit in (true, random)]
    expected = [float(fit.predicted[mid] / fit.predicted[0]) for fit in (true, random)]
    checks += [
        Check(
            "random labels are fitted more slowly, as predicted",
            f"{ARORA}, section 4",
            slower[0] < slower[1] and expected[0] < expected[1],
            f"|u - y| / |y| after {mid} steps: {slower[0]:.3f} and {slower[1]:.3f}; predicted {expected[0]:.3f} and {expected[1]:.3f}",
        ),
        Check(
            "the measure sqrt(2 y^T H_inf^-1 y / n) and the test error are both larger for random labels",
            f"{ARORA}, Theorem 5.1",
            true.measure < random.measure and true.test_error < random.test_error,
            f"measure {true.measure:.3g} and {random.measure:.3g}, test error {true.test_error:.3f} and {random.test_error:.3f}",
            must=False,
        ),
    ]
    return checks
