"""The findings of `lightning-conv lab clipping`: bounds, checks and rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_conv.recipes.lab.report import Check
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.clipping import SOURCE, ClippedPath, clipped_loss_bound

REGIME_COLOURS = {"floor": "tab:red", "clipped": "tab:orange", "full": "tab:blue"}


@dataclass(frozen=True)
class Checked:
    """One run of delta-GClip, the PL* constant mu used in its bounds, and the criteria that judge it."""

    path: ClippedPath
    mu: float
    criteria: Sequence[Criterion]
    proven: bool  # whether the hypotheses are proven

    def checks(self, where: str) -> list[Check]:
        """Check every inequality in ``criteria``, and whether all three regimes occur.

        Args:
            where: name of the run, put before each claim.
        """
        found = [Check.of(each, where, seen=f"{each.measured:.6g} against {each.bound:.6g}") for each in self.criteria]
        regimes = self.path.regimes
        shares = ", ".join(f"{name} {regimes.count(name)}" for name in REGIME_COLOURS)  # type: ignore[arg-type]
        return [
            *found,
            Check(f"{where}: all three regimes occur", SOURCE, len(set(regimes)) == 3, f"steps: {shares}", must=False),
        ]

    def row(self, where: str) -> dict[str, object]:
        """Return the table row of the run: column -> value (eta, mu, losses and path length with their bounds).

        Args:
            where: name of the run.
        """
        steps = len(self.path.norms)
        bound = clipped_loss_bound(
            self.path.losses[0], eta=self.path.eta, delta=self.path.delta, mu=self.mu, steps=steps
        )
        return {
            "run": where,
            "hypotheses proven": self.proven,
            "eta": self.path.eta,
            "mu": self.mu,
            "f_0": self.path.losses[0],
            "f_T": self.path.losses[-1],
            "bound of f_T": bound,
            "bound with the steps taken": self.bounds()[-1],
            "path length": self.path.length,
            "bound of it": 4 * math.sqrt(self.path.losses[0] / self.mu),
        }

    def bounds(self) -> list[float]:
        """Return prod_s (1 - h_s mu / 2) f_0, the bound with the steps taken; at most (1 - eta delta mu / 2)^t f_0."""
        bound, found = self.path.losses[0], [self.path.losses[0]]
        for step in self.path.steps:
            bound *= 1 - step * self.mu / 2
            found.append(bound)
        return found


def comparison(ends: dict[str, list[float]]) -> Check:
    """Check that delta-GClip ends below a loss of 0.5 at more learning rates than gradient descent."""
    best = {name: min(losses) for name, losses in ends.items()}
    usable = {name: sum(loss < 0.5 for loss in losses) for name, losses in ends.items()}
    seen = "; ".join(f"{name}: best {best[name]:.3g}, {usable[name]} rates end below 0.5" for name in ends)
    holds = usable["delta-GClip"] > usable["gradient descent"]
    return Check("delta-GClip bears more learning rates than gradient descent", SOURCE, holds, seen, must=False)
