"""The findings of `lightning-conv lab du`: comparisons, checks and rows of the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.recipes.lab.du import printed
from lightning_conv.recipes.lab.du.architectures import SOFTPLUS, SOURCE
from lightning_conv.recipes.lab.report import Check

DEFINITIONS = {"FC": "Definition 5.1", "ResNet": "Definition 6.1", "ConvResNet": "Definition 7.1"}


@dataclass(frozen=True)
class Case:
    """The limit kernel of one architecture and depth, and the kernels of random networks."""

    network: str
    depth: int
    limit: LimitKernel
    scale: float  # of the last line: c_sigma, or (c_res / H)^2
    draws: Tensor  # (draws, n, n)

    @property
    def standard_errors(self) -> Tensor:
        """Standard error of the mean of every entry, (n, n)."""
        return self.draws.std(0) / math.sqrt(len(self.draws))

    def z(self, kernel: Tensor) -> Tensor:
        """Return (mean - kernel) / standard error of the entries i <= j."""
        upper = torch.triu_indices(*kernel.shape)
        return ((self.draws.mean(0) - kernel) / self.standard_errors)[upper[0], upper[1]]

    def largest_z(self, kernel: Tensor) -> float:
        """Return the largest |z|."""
        return float(self.z(kernel).abs().max())

    @property
    def distance(self) -> float:
        """|mean - K|_F / |K|_F."""
        return float((self.draws.mean(0) - self.limit.matrix).norm() / self.limit.matrix.norm())


def comparisons(
    cases: list[Case], covariance: list[printed.Rival], pairing: list[printed.Rival]
) -> list[tuple[str, str, str, list[printed.Rival]]]:
    """Return (claim, its short name, source, one rival per depth) for every printed kernel that is tested."""

    def of(name: str, kernel: Callable[[Case], Tensor], *, scaled: bool = False) -> list[printed.Rival]:
        mine = (case for case in cases if case.network == name)
        return [printed.Rival(name, c.depth, c.limit.matrix, kernel(c), c.draws, scaled) for c in mine]

    fully = of("FC", lambda c: printed.covariance_before(c.limit, c.scale, SOFTPLUS, len(c.limit.matrix)))
    unscaled = of("ConvResNet", lambda c: c.limit.matrix / c.scale, scaled=True)
    found = [
        ("FC: the covariance of one layer before in the last line, as the definition prints it", "covariance", DEFINITIONS["FC"], fully),
        ("ResNet: the covariance of one layer before in the last line, as the definition prints it", "covariance", DEFINITIONS["ResNet"],
         covariance),
        ("ResNet, inputs of unequal norms: b_i E sigma(u) + b_j E sigma(v), as the definition prints it", "pairing",
         DEFINITIONS["ResNet"], pairing),
        ("ConvResNet: the last line without c_res^2 / H^2, as the definition prints it", "scale", DEFINITIONS["ConvResNet"], unscaled),
    ]  # fmt: skip
    return [(claim, what, f"{SOURCE}, {source}", rivals) for claim, what, source, rivals in found if rivals]


def row(case: Case) -> dict[str, object]:
    """Return the table row of one architecture and depth: column -> value."""
    z = case.z(case.limit.matrix)
    along = (case.draws * case.limit.matrix).sum((1, 2)) / case.limit.matrix.square().sum()
    return {
        "network": case.network,
        "H": case.depth,
        "|mean - K|_F / |K|_F": case.distance,
        "Monte Carlo error of it": float(case.standard_errors.norm() / case.limit.matrix.norm()),
        "largest |z|": float(z.abs().max()),
        "root mean square z": float(z.square().mean().sqrt()),
        "z of <G, K>": float(along.mean() - 1) / (float(along.std()) / math.sqrt(len(along))),
        "lambda_0": case.limit.lambda_0.value,
        "order": case.limit.order,
    }


def checks_of(cases: list[Case], threshold: float) -> list[Check]:
    """Check that every entry of every mean is within Monte Carlo error of its limit."""
    checks = []
    for name, definition in DEFINITIONS.items():
        mine = [case for case in cases if case.network == name]
        found = [case.largest_z(case.limit.matrix) for case in mine]
        checks.append(
            Check(
                f"{name}: every entry of the mean of G^(H) is within Monte Carlo error of K^(H), largest |z| <= {threshold:.2f}",
                f"{SOURCE}, {definition}",
                max(found) <= threshold,
                ", ".join(f"H = {case.depth}: {z:.2f}" for case, z in zip(mine, found, strict=True)),
            )
        )
    return checks
