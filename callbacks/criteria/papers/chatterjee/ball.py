"""Chatterjee's criterion in balls around the start of a run: a search for small ratios |grad f|^2 / f, and what the run's path adds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.losses.flat_weights import FlatWeights
from lightning_conv.losses.gradient import SampleLoss
from lightning_conv.losses.kind import LossFn
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.precision import in_float64
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.chatterjee import judge_ball, sampled_infima
from lightning_conv.theory.papers.chatterjee.descent import CHATTERJEE
from lightning_conv.theory.tools.observation import Observation

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of the radius: the balls that are searched, each from the best point of the one before."""

POINTS, STEPS, GRADIENTS_PER_STEP = 8, 20, 4
FLOAT64 = 2.0**-52
SLACK = 1000.0
"""Times the rounding of a loss: by how much a measured ratio may be too small, relative."""


@dataclass(frozen=True)
class BallSearch:
    """The smallest ratios that a search around w_0 has found."""

    points: tuple[tuple[float, float], ...]  # distance from w_0, |grad f|^2 / f
    reason: str = ""  # why nothing was searched

    def state(self) -> dict[str, Any]:
        """Return the search as plain types."""
        return {"points": [list(point) for point in self.points], "reason": self.reason}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BallSearch:
        """Rebuild a search from what ``state`` returned."""
        return cls(tuple((float(d), float(a)) for d, a in state["points"]), str(state["reason"]))


class ProbeLandscape:
    """f - inf f as a function of one float64 vector of the chosen weights of a network; the network is not copied.

    Args:
        network: left as it is.
        inputs: of the probe.
        targets: of the probe.
        loss_fn: of the run.
        names: of the weights.
        infimum: of the loss.
    """

    def __init__(
        self, network: nn.Module, inputs: Inputs, targets: Tensor, loss_fn: LossFn, names: Sequence[str], infimum: float
    ) -> None:
        self._loss = SampleLoss(network, inputs, targets, loss_fn, dtype=torch.float64)
        named = dict(network.named_parameters())
        own = {name: in_float64(named[name]) for name in names}
        self._weights, self._infimum = FlatWeights.of(own), infimum
        self.start = self._weights.flatten(own)

    @property
    def size(self) -> int:
        """P."""
        return self.start.numel()

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Return f(x) - inf f and the gradient.

        Where the difference is only rounding it is returned as 0, so that the ratio is infinite and refutes nothing.
        """
        value, gradient = self._loss.gradient(self._weights.names, at=self._weights.unflatten(x))
        above = value - self._infimum
        clear = self._infimum == 0 or above > SLACK * FLOAT64 * max(abs(value), abs(self._infimum))
        return (max(above, 0.0) if clear else 0.0), self._weights.flatten(gradient)

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """Return Hess f(x) v by central differences of the gradient, to about nine digits: it only steers the search."""
        length = 1e-5 * (1 + float(x.norm())) / float(v.norm())
        ahead, behind = (self.value_and_gradient(x + sign * length * v)[1] for sign in (1, -1))
        return (ahead - behind) / (2 * length)

    def still_points(self, mean: Tensor | None) -> list[Tensor]:
        """Return points where hidden layers have no gradient: all weights zero, without and with the mean target as the last bias.

        Args:
            mean: the mean target; the second point is left out where it does not fit the last bias.
        """
        points = [torch.zeros_like(self.start)]
        last = self._weights.shapes[self._weights.names[-1]]
        if mean is not None and len(last) == 1 and last.numel() == mean.numel():
            point = points[0].clone()
            point[-mean.numel() :] = mean.to(point)
            points.append(point)
        return points


def search_ball(landscape: ProbeLandscape, radius: float, *, mean: Tensor | None, seed: int = 0) -> BallSearch:
    """Look for small ratios within ``radius`` of w_0: at random points, at still points, and by descent on the ratio from the best.

    Args:
        landscape: f.
        radius: of the largest ball.
        mean: the mean target of a squared loss; None for another loss.
        seed: of the directions; no global random numbers are consumed.

    Cost: about 400 gradients of the probe in float64, with a bar on a terminal where that takes long.
    """
    began = time.perf_counter()
    value, gradient = landscape.value_and_gradient(landscape.start)
    seconds = (time.perf_counter() - began) * len(SHARES) * (POINTS + STEPS * GRADIENTS_PER_STEP)
    if not value > 0:
        return BallSearch((), "the loss is 0 at the start")
    with progress_bar(f"Smallest |grad f|^2 / f within {radius:.3g} of the start", seconds, None) as report:
        found = sampled_infima(
            landscape,
            [share * radius for share in SHARES],
            points=POINTS,
            descents=1,
            steps=STEPS,
            candidates=landscape.still_points(mean),
            seed=seed,
            report=report,
        )
    at_start = float(gradient.square().sum()) / value
    return BallSearch(((0.0, at_start), *((each.distance, each.ratio) for each in found)))


def ball_criterion(
    history: Sequence[Observation], search: BallSearch | None, radius: float | None, *, infimum: float = 0.0
) -> Criterion:
    """Judge Chatterjee's criterion by everything that was found around w_0, by the search and by the run itself.

    Args:
        history: of the run, from w_0 on.
        search: before its first step, or None.
        radius: radii up to here are asked about; None: all.
        infimum: of the loss; the losses of the history are those above it.

    Returns:
        ``refuted`` at most for radii up to ``radius``; never supported.
    """
    asks = "4 f(x_0) < r^2 alpha(x_0, r) for some r"
    known = [seen for seen in history if not math.isnan(seen.ratio) and not math.isnan(seen.loss)]
    if not known or known[0].distance != 0 or not known[0].loss > 0:
        why = "the loss was not measured at the start, or is 0 there"
        return Criterion("criterion_in_the_ball", CHATTERJEE, asks, math.nan, 1.0, "undecided", why)
    first = known[0]
    slack = SLACK * first.noise
    # Near its infimum a loss, and its gradient with it, is a difference that rounding has a share in.
    least = max(first.noise * first.loss, slack * abs(infimum))
    clear = [seen for seen in known if seen is first or seen.loss > least]
    points = [(seen.distance * (1 + slack), seen.ratio * (1 + slack)) for seen in clear]
    searched = () if search is None else search.points
    return judge_ball(first.loss * (1 - slack), [*points, *searched], radius=radius, source=CHATTERJEE)
