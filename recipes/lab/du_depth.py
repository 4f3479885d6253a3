"""`lab du --depth`: what depth costs, in the fully connected network and in the residual one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.analytic import softplus
from lightning_conv.kernels.infinite import LimitKernel, fully_connected_limit, residual_limit
from lightning_conv.plots import new_figure
from lightning_conv.progress import equal_parts, progress_bar
from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.du2layer_figure import dress
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.theory import DuFC, DuResNet
from lightning_conv.theory.du import feature_sensitivity, last_hidden_gram, propagation_bound

SOURCE = "Du, Lee, Li, Wang, Zhai 2019 (1811.03804)"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"softplus": softplus(1.0), "tanh": torch.tanh, "relu": torch.relu}
COLOURS = {"softplus": "tab:blue", "tanh": "tab:red", "relu": "tab:green"}
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
        tables={"Each network": [_row(each) for each in found]},
        figure=_draw(found),
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


def _of(found: Sequence[Depth], network: str, activation: str) -> list[Depth]:
    return [each for each in found if (each.network, each.activation) == (network, activation)]


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values)


def _checks(found: Sequence[Depth]) -> list[Check]:
    shallow, deep = found[0].depth, found[-1].depth
    span = f"H = {shallow} to {deep}"
    sensitivity, scaled, growth = {}, {}, {}
    for act in ACTIVATIONS:
        fc, res = _of(found, "FC", act), _of(found, "ResNet", act)
        sensitivity[act] = _spread([each.sensitivity for each in res])
        scaled[act] = _spread([each.depth**2 * each.limit.lambda_0.value for each in res])
        growth[act] = fc[-1].cost / fc[0].cost, res[-1].cost / res[0].cost
    tanh, relu, soft = (_of(found, "FC", act) for act in ("tanh", "relu", "softplus"))
    per_layer = (tanh[-1].sensitivity / tanh[0].sensitivity) ** (1 / (deep - shallow))
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
        Check(
            "FC with tanh: the sensitivity grows exponentially, as 2^(O(H)) allows",
            f"{SOURCE}, Theorem 5.1",
            per_layer > 1.05,
            f"{tanh[0].sensitivity:.3g} to {tanh[-1].sensitivity:.3g}, {per_layer:.3f} a layer; with relu {relu[0].sensitivity:.3g} to "
            f"{relu[-1].sensitivity:.3g}, with softplus {soft[0].sensitivity:.3g} to {soft[-1].sensitivity:.3g}",
            must=False,
        ),
    ]


def _draw(found: Sequence[Depth]) -> Figure:
    figure = new_figure()
    figure.set_size_inches(11, 8)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.07, top=0.955, hspace=0.28, wspace=0.22)
    sensitivity, smallest, gap, cost = figure.subplots(2, 2).flat
    for act, colour in COLOURS.items():
        for net, style in (("FC", "o-"), ("ResNet", "s--")):
            each = _of(found, net, act)
            depths = [d.depth for d in each]
            sensitivity.plot(
                depths, [d.sensitivity for d in each], style, color=colour, label=f"{net}, {act}", markersize=4
            )
            gap.plot(depths, [d.gap for d in each], style, color=colour, markersize=4)
            clear = [d for d in each if d.resolved]
            smallest.plot(
                [d.depth for d in clear],
                [d.limit.lambda_0.value / d.diagonal for d in clear],
                style,
                color=colour,
                markersize=4,
            )
            unclear = [d for d in each if not d.resolved]
            smallest.plot(
                [d.depth for d in unclear],
                [d.limit.lambda_0.upper / d.diagonal for d in unclear],
                "v",
                color=colour,
                mfc="none",
            )
            cost.plot([d.depth for d in clear], [d.cost for d in clear], style, color=colour, markersize=4)
            cost.plot([d.depth for d in unclear], [d.cost for d in unclear], "^", color=colour, mfc="none")
    bounds = _of(found, "FC", "tanh")
    limits = sensitivity.get_ylim()
    sensitivity.plot(
        [d.depth for d in bounds], [d.bound for d in bounds], ":", color="black", label="Lemma B.3 (FC, tanh)"
    )
    sensitivity.set_ylim(0.7, 30 * limits[1])
    for axes in (sensitivity, smallest, gap, cost):
        _logarithmic(axes, sorted({d.depth for d in found}))
    handles, _ = sensitivity.get_legend_handles_labels()
    sensitivity.legend(handles=handles[-1:], frameon=False, fontsize=9, loc="upper right")
    smallest.legend(handles=handles[:-1], frameon=False, fontsize=8, loc="lower left")
    gap.set_yscale("linear")
    gap.set_ylim(0, None)
    dress(sensitivity, "movement of the last features per R", "depth H", "sqrt(m) |d x^(H) / d W|_2")
    dress(smallest, "lambda_0 of the limit kernel (hollow: at most)", "depth H", "lambda_0 / mean of K_ii")
    dress(gap, "finite width at the start", "depth H", "|G(0) - K|_2 / |K|_2")
    dress(
        cost,
        "cost: sensitivity over relative lambda_0 (hollow: at least)",
        "depth H",
        "sensitivity * mean K_ii / lambda_0",
    )
    return figure


def _logarithmic(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(np.array(depths), [str(h) for h in depths])


def _setting(n: int, width: int, c_res: float) -> str:
    return (
        f"Networks of width {width} at their start, {n} digits (classes 3 and 8) of norm 1, c_res = {c_res}. Sensitivity: the largest "
        "movement of x^(H), to first order, when the weights of all layers together move by sqrt(m) R, over R, the largest of "
        f"{SAMPLES} samples (the quantity that Lemma B.3 bounds; the proof's constant grows exponentially with H for the fully "
        "connected network). lambda_0: of K^(H), by the recursion. The drift of the kernel is of the order of the sensitivity times R "
        "times K_ii, and has to stay below lambda_0 / 4: so the radius R that the proof leaves the weights shrinks like 1 / cost, with "
        "cost = sensitivity * (mean K_ii) / lambda_0. "
        f"Distance to the limit: mean of {DRAWS} draws. softplus and tanh are smooth, as the theorems ask; relu is not."
    )
