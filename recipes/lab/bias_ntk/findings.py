"""The findings of `lightning-conv lab bias_ntk`: checks and rows of the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lightning_conv import Bounded
from lightning_conv.recipes.lab.report import Check, with_verdict
from lightning_conv.theory.papers.bias_ntk import SOURCE, active_probability, stays_sparse


@dataclass(frozen=True)
class Run:
    """The trained network of one threshold B."""

    threshold: float
    eta: float
    kernel: Tensor  # H(B)
    smallest: Bounded  # lambda_min(H(B))
    largest: float
    deviation: float  # largest |G_ij - H(B)_ij| in standard errors of a network of this width
    share_error: float  # deviation of the active share at the start from 1 - Phi(B), in standard errors
    losses: list[float]
    predicted: list[float]  # losses of the linearised model with H(B)
    predicted_steps: int  # steps after which the predicted loss is the one at which training ended
    probed: list[int]
    mean_active: list[float]
    most_active: list[float]  # active share of the sample with the largest share
    switched: float  # share of units that changed over the whole training

    @property
    def steps(self) -> int:
        """Number of steps of gradient descent until training ended."""
        return len(self.losses) - 1


def checks_of(runs: Sequence[Run], max_steps: int) -> list[Check]:
    """Check the limit kernel, the sparsity and the speed of all thresholds."""
    dense, sparse = runs[0], runs[1:]
    entries = max(r.deviation for r in runs)
    shares = max(r.share_error for r in runs)
    criteria = [
        stays_sparse(max(r.most_active), r.threshold, when=f"B = {r.threshold:g}, every step and sample")
        for r in sparse
    ]
    off = max(max(r.steps / r.predicted_steps, r.predicted_steps / r.steps) for r in runs)
    growth = [r.mean_active[-1] / active_probability(r.threshold) for r in runs]
    relative = [r.smallest.value / active_probability(r.threshold) for r in runs]
    return [
        Check("the network's NTK is H(B) up to chance: every entry within 5.5 standard errors", SOURCE, entries < 5.5,
              f"largest deviation of {len(runs)} kernels: {entries:.2f} standard errors"),
        Check("active share at the start = 1 - Phi(B), every sample within 5 standard errors", SOURCE, shares < 5,
              f"largest deviation {shares:.2f} standard errors"),
        *(Check.of(c, seen=with_verdict(c), must=False) for c in criteria),
        Check("lambda_min(H(B)) > 0", SOURCE, all(r.smallest.lower > 0 for r in runs),
              "proven for the kernel as computed: " + ", ".join(f"B = {r.threshold:g}: {r.smallest.value:.4g}" for r in runs)),
        Check("sparse networks converge as fast as the dense one, each at its own step size", SOURCE,
              all(r.steps <= dense.steps and r.steps < max_steps for r in sparse),
              "steps: " + ", ".join(f"B = {r.threshold:g}: {r.steps}" for r in runs), must=False),
        Check("the linearised model with H(B) predicts the number of steps to a factor of 1.5", SOURCE, off < 1.5,
              "predicted: " + ", ".join(f"B = {r.threshold:g}: {r.predicted_steps}" for r in runs), must=False),
        Check("the share of active units grows by less than a tenth over training", SOURCE, max(growth) < 1.1,
              "end / (1 - Phi(B)): " + ", ".join(f"{value:.3f}" for value in growth), must=False),
        Check("lambda_min(H(B)) falls no faster than the share of active units", "observed on these data",
              all(b >= a * (1 - 1e-9) for a, b in pairwise(relative)),
              "lambda_min / (1 - Phi(B)): " + ", ".join(f"{v:.4f}" for v in relative), must=False),
    ]  # fmt: skip


def row(r: Run) -> dict[str, object]:
    """Return the table row of one threshold B: column -> number (kernel, active shares, steps measured and predicted)."""
    return {
        "B": r.threshold,
        "1 - Phi(B)": active_probability(r.threshold),
        "active, start": r.mean_active[0],
        "active, end": r.mean_active[-1],
        "active, most": max(r.most_active),
        "exp(-B^2/2)": math.exp(-(r.threshold**2) / 2),
        "switched units": r.switched,
        "lambda_min(H(B))": r.smallest.value,
        "lambda_max(H(B))": r.largest,
        "condition": r.largest / r.smallest.value,
        "steps": r.steps,
        "predicted": r.predicted_steps,
    }
