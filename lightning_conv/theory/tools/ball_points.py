"""Random points of a ball around the weights, at which a claim about the whole ball can be refuted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def ball_points(centre: Tensor, radius: float, count: int, seed: int) -> Iterator[Tensor]:
    """Draw points in uniform directions at uniform distances.

    Uniform points of a ball in many dimensions would all lie near its surface.

    Args:
        centre: Centre of the ball, (P,), float64.
        radius: Radius of the ball.
        count: Number of points.
        seed: Seed of the points; the global random state is not used.

    Yields:
        One point, (P,), at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        direction = torch.randn(len(centre), generator=generator, dtype=torch.float64).to(centre)
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        yield centre + direction * (share * radius / direction.norm())
