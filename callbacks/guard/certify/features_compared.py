"""Features of the training step, compared with those that are certified: all of them, or their projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_conv.losses.of_outputs import ULPS

NEGLIGIBLE = 1e-6  # part of the largest feature below which a column counts as being of that size
LARGEST = 0.5  # power of eps: relative rounding of a network beyond which two evaluations are those of two functions
DIRECTIONS = 4  # random directions on which features are projected, to recognise them


def other_features(made: Tensor, exact: Tensor, coarse: Tensor) -> str:
    r"""Return how features differ from those of the float64 copy by more than rounding; empty if they do not.

    Column by column, :math:`64\, (\epsilon \max_i |h_{ij}| + r_j)`, where r_j is the difference of a float32 evaluation of the
    function from one in float64, and the size of a column counts as 1e-6 of the largest at least. That difference must itself be small,
    at most :math:`\sqrt\epsilon \max |h|`: else float64 shows another function.

    Args:
        made: h of the training step, (n, m).
        exact: h of the float64 copy.
        coarse: r, (m,).
    """
    if made.shape != exact.shape:
        return f"the training step computes features of shape {tuple(made.shape)}, the certificate is about {tuple(exact.shape)}"
    eps, largest = torch.finfo(made.dtype).eps, float(exact.abs().max())
    if float(coarse.max()) > eps**LARGEST * largest and eps > torch.finfo(torch.float64).eps:
        return (
            f"the features in float64 are {float(coarse.max()):.2g} apart from those in the run's precision, more than rounding explains, "
            "so the certificate is not about the latter"
        )
    apart, allowed = (made.double() - exact).abs().amax(0), columns_rounding(exact, coarse, eps)
    if bool((apart <= allowed).all()):
        return ""
    worst = int((apart - allowed).argmax())
    return (
        f"the training step computes other features than those that are certified: {float(apart[worst]):.2g} apart, where rounding "
        f"explains {float(allowed[worst]):.1g}"
    )


def columns_rounding(exact: Tensor, coarse: Tensor, eps: float) -> Tensor:
    """Return by how much rounding may change features, column by column, see ``other_features``.

    Args:
        exact: h of the float64 copy, (n, m).
        coarse: r, (m,).
        eps: Twice the unit roundoff of the type in which the step computes them.
    """
    sizes = exact.abs().amax(0)
    return ULPS * (eps * sizes.clamp(min=NEGLIGIBLE * float(sizes.max())) + coarse)


def project(features: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Project features on random directions that are always the same: (n, m) -> (n, 4), in float64.

    Args:
        features: h.
        sizes: Of each column, (m,), by which it is divided first: a large one would hide the others. None: 1.
    """
    by_column = directions(features.shape[-1]).to(features.device)
    return features.double() @ (by_column if sizes is None else by_column / sizes.to(features.device)[:, None])


def largest_of(features: Tensor) -> Tensor:
    """Return the largest absolute value of each column, (m,), in float64.

    Args:
        features: h, (..., m).
    """
    return features.double().abs().reshape(-1, features.shape[-1]).amax(0).cpu()


def sizes_of(largest: Sequence[Tensor]) -> Tensor:
    """Return the size of each column over the whole training set, at least 1e-6 of the largest of all, (m,).

    One batch would not do: a column that is zero there would hide all others elsewhere.

    Args:
        largest: Of the columns, in each batch.
    """
    sizes = torch.stack(list(largest)).amax(0)
    return sizes.clamp(min=max(NEGLIGIBLE * float(sizes.max()), torch.finfo(torch.float64).tiny))


@cache
def directions(width: int) -> Tensor:
    """Return the directions of ``project``, (m, 4).

    Args:
        width: m.
    """
    return torch.randn(width, DIRECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass(frozen=True)
class Expected:
    """Holds the features of a batch as they were certified."""

    projected: Tensor  # (rows, DIRECTIONS), float64
    sizes: Tensor | None  # of the columns, see ``project``
    spread: Tensor  # by how much rounding may change them, (DIRECTIONS,)

    def unlike(self, features: Tensor) -> bool:
        """Return whether these features are others.

        Args:
            features: h that enters the head, (rows, m).
        """
        found = project(features, self.sizes).reshape(-1, DIRECTIONS).cpu()
        return found.shape != self.projected.shape or not bool(((found - self.projected).abs() <= self.spread).all())


def closest_pair(points: Tensor, apart: Tensor) -> tuple[int, int] | None:
    """Return two points that are at most so far apart in every coordinate; None: there are none.

    Args:
        points: Coordinates, (n, k).
        apart: Distances, (k,).

    Cost: a sort by the first coordinate, and the comparison of points that are close in it.
    """
    order = points[:, 0].argsort()
    for step in range(1, len(order)):
        apart_by = (points[order[step:]] - points[order[:-step]]).abs() <= apart
        if not bool(apart_by[:, 0].any()):
            return None
        if bool((hit := apart_by.all(1)).any()):
            place = int(hit.int().argmax())
            return int(order[place]), int(order[place + step])
    return None
