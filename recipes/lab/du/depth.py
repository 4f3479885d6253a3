"""`lab du --depth`: what depth costs, in the fully connected network and in the residual one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.infinite import LimitKernel, fully_connected_limit, residual_limit
from lightning_conv.networks.analytic import softplus
from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.du.depth_figure import draw
from lightning_conv.recipes.lab.du.depth_laws import DepthLaw, depth_law
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.progress import equal_parts, progress_bar
from lightning_conv.theory import DuFC, DuResNet
from lightning_conv.theory.papers.du import feature_sensitivity, last_hidden_gram, propagation_bound

SOURCE = "Du, Lee, Li, Wang, Zhai 2019 (1811.03804)"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"softplus": softplus(1.0), "tanh": torch.tanh, "relu": torch.relu}
DRAWS = 8
"""Networks at each depth, for means over the initialisation."""

SAMPLES = 3
"""Samples whose sensitivity is computed, the costly part."""


@dataclass(frozen=True)
class Depth:
    """One architecture, activation and depth."""

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
        """Whether lambda_0 stands above its error."""
        return self.limit.lambda_0.resolved

    @property
    def cost(self) -> float:
        """Sensitivity over relative lambda_0, from below where lambda_0 is not resolved."""
        lambda_0 = self.limit.lambda_0
        return self.sensitivity * self.diagonal / (lambda_0.value if self.resolved else lambda_0.upper)


def run_depth(*, n: int, width: int, depths: Sequence[int], c_res: float, seed: int) -> Report:
    """Sensitivity of the last features, lambda_0 and the distance to the limit, against depth.

    Args:
        n: samples.
        width: m.
        depths: H.
        c_res: of the residual network.
        seed: of data and weights.
    """
    x = two_classes(n, seed=seed).inputs
    found: list[Depth] = []
    cases = [(net, act, h) for net in ("FC", "ResNet") for act in ACTIVATIONS for h in depths]
    flops = 2 * len(ACTIVATIONS) * SAMPLES * 6 * width**3 * sum(depths)
    with progress_bar("depths", flops * 1e-10, None) as bar:
        for (net, act, h), report in zip(cases, equal_parts(bar, len(cases)), strict=True):
            found.append(_measure(net, act, h, x, width, c_res, seed))
            report(1.0)
    return Report(
        name="du-depth",
        title="What depth costs: the fully connected network pays, the residual one does not",
        setting=_setting(n, width, c_res),
        checks=_checks(found),
        tables={
            "Each network": [_row(each) for each in found],
            "Exponential or power law, fitted to all depths": [
                _law_row(net, act, what, law(of(found, net, act)))
                for net in ("FC", "ResNet")
                for act in ACTIVATIONS
                for what, law in (("sensitivity", sensitivity_law), ("cost", cost_law))
            ],
        },
        figure=draw(found),
        data={"sensitivity": {f"{d.network} {d.activation} {d.depth}": d.sensitivity for d in found}},
    )


def _measure(net: str, act: str, depth: int, x: Tensor, width: int, c_res: float, seed: int) -> Depth:
    activation = ACTIVATIONS[act]
    limit = (
        fully_connected_limit(x, depth, activation)
        if net == "FC"
        else residual_limit(x, depth, activation, c_res=c_res)
    )
    size, gaps, sensitivity, bound = float(torch.linalg.matrix_norm(limit.matrix, 2)), [], 0.0, math.nan
    for k in range(DRAWS):
        network = (
            DuFC(x.shape[1], width, depth, activation=activation, seed=seed + k)
            if net == "FC"
            else DuResNet(x.shape[1], width, depth, activation=activation, c_res=c_res, seed=seed + k)
        )
        gaps.append(float(torch.linalg.matrix_norm(last_hidden_gram(network, x) - limit.matrix, 2)) / size)
        if k == 0:
            sensitivity = float(feature_sensitivity(network, x[:SAMPLES]).max())
            bound = propagation_bound(network) if isinstance(network, DuFC) else math.nan
    return Depth(net, act, depth, sensitivity, bound, limit, sum(gaps) / DRAWS)


def _row(each: Depth) -> dict[str, object]:
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
    """The depths of one network and activation."""
    return [each for each in found if (each.network, each.activation) == (network, activation)]


def sensitivity_law(cases: Sequence[Depth]) -> DepthLaw:
    """How the sensitivity depends on depth."""
    return depth_law([each.depth for each in cases], [each.sensitivity for each in cases])


def cost_law(cases: Sequence[Depth]) -> DepthLaw:
    """How sensitivity over relative lambda_0 depends on depth, where lambda_0 is resolved."""
    clear = [each for each in cases if each.resolved]
    return depth_law([each.depth for each in clear], [each.cost for each in clear])


def _law_row(net: str, act: str, what: str, law: DepthLaw) -> dict[str, object]:
    return {
        "network": net, "sigma": act, "quantity": what, "depths": law.points, "largest / smallest": law.spread,
        "exp: rate a layer": law.rate, "exp: residual in ln": law.exponential_residual, "power: exponent": law.exponent,
        "power: residual in ln": law.power_residual, "fits": law.better,
    }  # fmt: skip


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values)


def _checks(found: Sequence[Depth]) -> list[Check]:
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


def _setting(n: int, width: int, c_res: float) -> str:
    return (
        f"Networks of width {width} at their start, {n} digits (classes 3 and 8) of norm 1, c_res = {c_res}. Sensitivity: the largest "
        "movement of x^(H), to first order, when the weights of all layers together move by sqrt(m) R, over R, the largest of "
        f"{SAMPLES} samples (the quantity that Lemma B.3 bounds; the proof's constant grows exponentially with H for the fully "
        "connected network). lambda_0: of K^(H), by the recursion. The drift of the kernel is of the order of the sensitivity times R "
        "times K_ii, and has to stay below lambda_0 / 4: so the radius R that the proof leaves the weights shrinks like 1 / cost, with "
        "cost = sensitivity * (mean K_ii) / lambda_0. "
        "Whether something grows exponentially or like a power is told by fitting both laws to all depths: one fits if its residual is at "
        "most half of the other's, and else they are not told apart; what changes by less than a factor 1.5 is flat. "
        f"Distance to the limit: mean of {DRAWS} draws. softplus and tanh are smooth, as the theorems ask; relu is not."
    )
