"""Simulations that refute the limit kernels as printed in Definitions 5.1, 6.1 and 7.1 of Du et al. 2019."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from lightning_conv.kernels.infinite import HermiteDual, LimitKernel, residual_limit
from lightning_conv.networks.activation import Activation
from lightning_conv.recipes.lab.report import Check
from lightning_conv.theory import DuResNet
from lightning_conv.theory.papers.du import last_hidden_gram

LEVEL = 1e-3
"""Probability with which correct kernels would look refuted, over all depths of one comparison (Bonferroni)."""

C_RES = 0.9
"""Factor c_res of these networks. Skip connections hide the difference; larger residual branches hide it less."""

MORE_DRAWS = 8
"""Number of residual networks per depth over ``draws``, at half the width: noise ~ 1 / sqrt(draws m), work ~ m^2."""

SPREAD = 4.0
"""Ratio of the largest and the smallest norm of the inputs for the pairing; for equal norms the kernels are equal."""


@dataclass(frozen=True)
class Rival:
    """Two kernels for the same networks: the one of the recursion ("right"), and the printed one."""

    network: str
    depth: int
    right: Tensor  # (n, n)
    printed: Tensor  # (n, n)
    draws: Tensor  # G^(H) of random networks, (draws, n, n)
    scaled: bool = False  # they differ by a factor, so that their difference is along the kernel itself

    @property
    def direction(self) -> Tensor:
        """D = printed - right, without its part along the right kernel, where the noise of the networks is largest."""
        difference = self.printed - self.right
        if self.scaled:
            return difference
        return difference - (difference * self.right).sum() / self.right.square().sum() * self.right

    def z(self, kernel: Tensor) -> float:
        """Return (mean of <G, D> - <kernel, D>) / standard error."""
        values = (self.draws * self.direction).sum((1, 2))
        return float(values.mean() - (kernel * self.direction).sum()) / (float(values.std()) / math.sqrt(len(values)))


def covariance_before(limit: LimitKernel, scale: float, activation: Activation, n: int) -> Tensor:
    """Return K^(H) with the expectation of sigma' sigma' over the covariance K^(H-2), as the definitions print it.

    Args:
        limit: limit kernel of the recursion.
        scale: c_sigma, or (c_res / H)^2.
        activation: elementwise activation sigma.
        n: number of samples.
    """
    before, last = limit.covariances[-2:]
    dual = HermiteDual(activation, limit.order)
    terms = scale * last * dual.derivative_moment(before, before.diagonal(), before.diagonal())
    positions = len(terms) // n
    return terms.view(n, positions, n, positions).diagonal(dim1=1, dim2=3).sum(-1)


def paired_as_printed(x: Tensor, limit: LimitKernel, depth: int, activation: Activation, c_res: float) -> Tensor:
    """Return K^(H) of the residual network with b_i E sigma(u) + b_j E sigma(v), as Definition 6.1 prints it.

    Args:
        x: inputs of any norm, (n, d).
        limit: limit kernel of the recursion.
        depth: number H of layers, 2 or more.
        activation: elementwise activation sigma.
        c_res: factor c_res of the branches.
    """
    dual, step = HermiteDual(activation, limit.order), c_res / depth
    first = x @ x.T
    mean = limit.c_sigma**0.5 * dual.mean(first.diagonal())
    now = limit.c_sigma * dual.moment(first, first.diagonal(), first.diagonal())
    for _ in range(2, depth):
        branch = dual.mean(now.diagonal())
        own = mean * branch
        moment = dual.moment(now, now.diagonal(), now.diagonal())
        now, mean = now + step * (own[:, None] + own[None, :]) + step**2 * moment, mean + step * branch
    return step**2 * now * dual.derivative_moment(now, now.diagonal(), now.diagonal())


def residual_rivals(
    x: Tensor,
    depths: Sequence[int],
    width: int,
    draws: int,
    activation: Activation,
    seed: int,
    report: Callable[[float], None],
) -> tuple[list[Rival], list[Rival]]:
    """Simulate the covariance and the pairing of Definition 6.1 from H = 3 on, where the last layer follows a skip connection.

    Args:
        x: inputs of norm 1, (n, d); for the pairing they are stretched to norms ``SPREAD`` apart.
        depths: numbers H of layers.
        width: number m of units.
        draws: number of networks per depth.
        activation: elementwise activation sigma.
        seed: seed of the weights.
        report: called with the share that is done.

    Returns:
        The rivals for the covariance and those for the pairing, one per depth of 3 or more.
    """
    n = len(x)
    exponents = torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
    stretched = x * SPREAD ** exponents[:, None]
    deep = [depth for depth in depths if depth >= 3]
    covariance, pairing = [], []
    for done, depth in enumerate(deep):
        limit, other = (residual_limit(each, depth, activation, c_res=C_RES) for each in (x, stretched))
        equal, unequal = [], []
        for k in range(draws):
            network = DuResNet(x.shape[1], width, depth, activation=activation, c_res=C_RES, seed=seed + k)
            both = last_hidden_gram(network, torch.cat([x, stretched]))
            equal.append(both[:n, :n])
            unequal.append(both[n:, n:])
        before = covariance_before(limit, (C_RES / depth) ** 2, activation, n)
        covariance.append(Rival("ResNet", depth, limit.matrix, before, torch.stack(equal)))
        paired = paired_as_printed(stretched, other, depth, activation, C_RES)
        pairing.append(Rival("ResNet", depth, other.matrix, paired, torch.stack(unequal)))
        report((done + 1) / len(deep))
    return covariance, pairing


def threshold(rivals: Sequence[Rival]) -> float:
    """Return the |z| above which a kernel is refuted: Student's t, Bonferroni over the depths."""
    return float(stats.t.ppf(1 - LEVEL / (2 * len(rivals)), len(rivals[0].draws) - 1))


def check(claim: str, source: str, rivals: Sequence[Rival]) -> Check:
    """Check that the printed kernel is refuted at every depth, and the one of the recursion at none.

    Args:
        claim: printed statement, in words.
        source: definition in the paper.
        rivals: the two kernels and their networks, one per depth.
    """
    limit = threshold(rivals)
    pairs = [(rival, rival.z(rival.printed), rival.z(rival.right)) for rival in rivals]
    return Check(
        f"{claim}, is refuted at H = {', '.join(str(rival.depth) for rival in rivals)}, |z| > {limit:.2f}; the kernel here at none",
        source,
        all(abs(printed) > limit >= abs(right) for _, printed, right in pairs),
        "z of the two: "
        + ", ".join(f"{printed:.1f} and {right:.1f} (H = {rival.depth})" for rival, printed, right in pairs),
        must=False,
    )


def row(what: str, rival: Rival) -> dict[str, object]:
    """Return the table row of one comparison of a printed kernel with the right one: column -> value."""
    return {
        "network": rival.network, "H": rival.depth, "printed": what, "networks": len(rival.draws),
        "z of the printed kernel": rival.z(rival.printed), "z of the kernel here": rival.z(rival.right),
    }  # fmt: skip
