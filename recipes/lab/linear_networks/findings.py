"""The findings of `lightning-conv lab linear_networks`: checks and rows of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_conv.recipes.lab.report import Check
from lightning_conv.theory.papers.linear_networks import SOURCE
from lightning_conv.theory.tools.matrix_norms import numerical_rank
from lightning_conv.theory.tools.power_law import PowerLaw


@dataclass(frozen=True)
class Drift:
    """The change of the balancedness over one run of fixed length in time."""

    eta: float
    steps: int
    moved: float  # max_l |D_l(T) - D_l(0)|_2
    bound: float
    identity: float  # |D(T) - D(0) - sum of the steps' own changes| over |D(0)|


@dataclass(frozen=True)
class Path:
    """The product of one network in training."""

    depth: int
    time: list[float]
    loss: list[float]
    values: list[Tensor]  # singular values of the product
    rank: list[float]  # effective


def checks_of(drifts: Sequence[Drift], law: PowerLaw, paths: Sequence[Path], off: float) -> list[Check]:
    """Check the conservation of the balancedness, the modes in closed form, and the rank by depth."""
    half = {p.depth: _at_half(p) for p in paths}
    falls = all(a > b for a, b in pairwise(half[d] for d in sorted(half)))
    return [
        Check("a step changes D_l by exactly eta^2 (G_(l+1)^T G_(l+1) - G_l G_l^T)", "derived: first order cancels",
              all(d.identity < 1e-11 for d in drifts), f"over whole runs, off by {max(d.identity for d in drifts):.1e} of |D(0)|_F"),
        Check("max_l |D_l(T) - D_l(0)|_2 <= sum eta^2 max |G_l|_F^2", SOURCE, all(d.moved <= d.bound for d in drifts),
              "; ".join(f"eta {d.eta:g}: {d.moved:.3g} <= {d.bound:.3g}" for d in drifts)),
        Check("the drift at a fixed time falls as eta: exponent 1 (gradient flow conserves D)", SOURCE, abs(law.exponent - 1) < 0.15,
              f"exponent {law.exponent:.3f} +- {law.error:.3f}", must=False),
        Check("modes of two layers grow as s / (1 + (s/a_0 - 1) e^(-2 s t)), to 2 % of s", "Saxe, McClelland, Ganguli 2014", off < 0.02,
              f"largest difference {off:.4f} s, with eta = 0.01 in place of the flow"),
        Check("the deeper, the lower the rank of the product at half of the loss", "observed; Arora, Cohen, Hu, Luo 2019",
              falls, "effective rank: " + ", ".join(f"L = {d}: {r:.2f}" for d, r in half.items()), must=False),
    ]  # fmt: skip


def _at_half(path: Path) -> float:
    return next(
        rank
        for rank, loss in zip(path.rank, path.loss, strict=True)
        if loss <= path.loss[0] / 2 or loss == path.loss[-1]
    )


def row(path: Path) -> dict[str, object]:
    """Return the table row of the rank of one network: column -> value."""
    at = [
        next(k for k, loss in enumerate(path.loss) if loss <= share * path.loss[0] or k == len(path.loss) - 1)
        for share in (0.75, 0.5, 0.25)
    ]
    ranks = {
        f"effective rank at {share} of the loss": path.rank[k]
        for share, k in zip(("3/4", "1/2", "1/4"), at, strict=True)
    }
    final = torch.diag(path.values[-1])
    return {
        "L": path.depth,
        **ranks,
        "at the end": path.rank[-1],
        "rank at the end (1e-3)": numerical_rank(final),
        "loss at the end / start": path.loss[-1] / path.loss[0],
    }


def drift_row(d: Drift) -> dict[str, object]:
    """Return the table row of the balancedness at one step size: column -> value."""
    return {
        "eta": d.eta,
        "steps": d.steps,
        "max |D(T) - D(0)|": d.moved,
        "bound": d.bound,
        "moved / eta": d.moved / d.eta,
        "identity off by": d.identity,
    }


def plain(path: Path) -> dict[str, object]:
    """Return a path as plain numbers for the JSON file: ``depth``, and ``time``, ``rank`` and ``loss`` by step."""
    return {"depth": path.depth, "time": path.time, "rank": path.rank, "loss": path.loss}
