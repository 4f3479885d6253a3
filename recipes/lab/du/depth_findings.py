"""The findings of `lightning-conv lab du_depth`: checks and rows of the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.recipes.lab.du.architectures import SOFTPLUS, SOURCE
from lightning_conv.recipes.lab.du.depth_laws import DepthLaw, depth_law
from lightning_conv.recipes.lab.report import Check

DRAWS = 8
"""Number of networks at each depth, for means over the initialisation."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"softplus": SOFTPLUS, "tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class Depth:
    """Measurements of one architecture and activation at one depth."""

    network: str  # "FC" or "ResNet"
    activation: str
    depth: int
    sensitivity: float
    bound: float  # Lemma B.3; NaN for the ResNet
    limit: LimitKernel
    gap: float  # mean of |G^(H)(0) - K^(H)|_2 / |K^(H)|_2

    @property
    def diagonal(self) -> float:
        """Mean of K_ii."""
        return float(self.limit.matrix.diagonal().mean())

    @property
    def resolved(self) -> bool:
        """Whether lambda_0 is larger than its error."""
        return self.limit.lambda_0.resolved

    @property
    def cost(self) -> float:
        """Sensitivity over relative lambda_0; a lower bound where lambda_0 is not resolved."""
        lambda_0 = self.limit.lambda_0
        return self.sensitivity * self.diagonal / (lambda_0.value if self.resolved else lambda_0.upper)


def row(each: Depth) -> dict[str, object]:
    """Return the table row of one network at one depth: column -> value."""
    lambda_0 = each.limit.lambda_0
    return {
        "network": each.network,
        "sigma": each.activation,
        "H": each.depth,
        "sensitivity": each.sensitivity,
        "Lemma B.3": f"{each.bound:.3g}" if each.network == "FC" else "-",
        "lambda_0": f"{lambda_0.value:.4g}" if each.resolved else f"<= {lambda_0.upper:.1g}",
        "H^2 lambda_0": each.depth**2 * lambda_0.value if each.resolved else "-",
        "lambda_0 / mean K_ii": lambda_0.value / each.diagonal if each.resolved else "-",
        "|G(0)-K|_2 / |K|_2": each.gap,
        "cost": f"{each.cost:.4g}" if each.resolved else f">= {each.cost:.1g}",
    }


def of(found: Sequence[Depth], network: str, activation: str) -> list[Depth]:
    """Return the measurements of one network and activation at all depths."""
    return [each for each in found if (each.network, each.activation) == (network, activation)]


def sensitivity_law(cases: Sequence[Depth]) -> DepthLaw:
    """Fit how the sensitivity depends on depth."""
    return depth_law([each.depth for each in cases], [each.sensitivity for each in cases])


def cost_law(cases: Sequence[Depth]) -> DepthLaw:
    """Fit how sensitivity over relative lambda_0 depends on depth, where lambda_0 is resolved."""
    clear = [each for each in cases if each.resolved]
    return depth_law([each.depth for each in clear], [each.cost for each in clear])


def law_row(net: str, act: str, what: str, law: DepthLaw) -> dict[str, object]:
    """Return the table row of one fitted law: column -> value."""
    return {
        "network": net, "sigma": act, "quantity": what, "depths": law.points, "largest / smallest": law.spread,
        "exp: rate a layer": law.rate, "exp: residual in ln": law.exponential_residual, "power: exponent": law.exponent,
        "power: residual in ln": law.power_residual, "fits": law.better,
    }  # fmt: skip


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values)


def checks_of(found: Sequence[Depth]) -> list[Check]:
    """Check sensitivity, lambda_0 and their ratio against depth: stable and 1 / H^2 for the ResNet, exponential for the FC network."""
    shallow, deep = found[0].depth, found[-1].depth
    span = f"H = {shallow} to {deep}"
    sensitivity, scaled, growth = {}, {}, {}
    for act in ACTIVATIONS:
        fc, res = of(found, "FC", act), of(found, "ResNet", act)
        sensitivity[act] = _spread([each.sensitivity for each in res])
        scaled[act] = _spread([each.depth**2 * each.limit.lambda_0.value for each in res])
        growth[act] = fc[-1].cost / fc[0].cost, res[-1].cost / res[0].cost
    tanh, soft = (of(found, "FC", act) for act in ("tanh", "softplus"))
    return [
        Check(
            f"ResNet: the sensitivity is stable, {span}: largest over smallest at most 1.5, for every activation",
            f"{SOURCE}, section 6",
            max(sensitivity.values()) <= 1.5,
            ", ".join(f"{act} {value:.3f}" for act, value in sensitivity.items()),
        ),
        Check(
            f"ResNet: lambda_0 falls like 1 / H^2, {span}: H^2 lambda_0 within a factor 1.5, for every activation",
            f"{SOURCE}, Proposition F.2",
            max(scaled.values()) <= 1.5,
            ", ".join(f"{act} {value:.3f}" for act, value in scaled.items()),
        ),
        Check(
            "FC: the sensitivity stays below Lemma B.3's bound",
            f"{SOURCE}, Lemma B.3",
            all(each.sensitivity <= each.bound for each in found if each.network == "FC"),
            f"at H = {deep}: "
            + ", ".join(
                f"{each[-1].sensitivity:.3g} <= {each[-1].bound:.2g} ({each[-1].activation})" for each in (tanh, soft)
            ),
        ),
        Check(
            f"FC: sensitivity over relative lambda_0 grows from H = {shallow} to {deep}, for every activation, and more than the ResNet's",
            f"{SOURCE}, sections 5 and 6",
            all(fc > 1.5 * max(res, 1.0) for fc, res in growth.values()),
            ", ".join(f"{act}: FC {fc:.3g} times, ResNet {res:.3g}" for act, (fc, res) in growth.items()),
        ),
        *(
            Check(
                f"FC: {what} grows exponentially with H for every activation (2^(O(H)) is what the theorem allows for)",
                f"{SOURCE}, Theorem 5.1",
                all(law.better == "exponential" for law in laws.values()),
                ", ".join(f"{act}: {law}" for act, law in laws.items()),
                must=False,
            )
            for what, laws in (
                ("the sensitivity", {act: sensitivity_law(of(found, "FC", act)) for act in ACTIVATIONS}),
                ("sensitivity over relative lambda_0", {act: cost_law(of(found, "FC", act)) for act in ACTIVATIONS}),
            )
        ),
    ]
