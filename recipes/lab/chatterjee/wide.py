"""Random starts of wide networks: the width from which on the criterion is proven, and a certified descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_conv.losses.objective import Objective
from lightning_conv.recipes.lab.data import TwoClasses
from lightning_conv.recipes.lab.report import Check
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.papers.chatterjee import DescentCertificate, certify_descent, judge_path
from lightning_conv.theory.papers.chatterjee.ratio import SOURCE
from lightning_conv.theory.tools.descent import Descent, gradient_descent
from lightning_conv.theory.tools.power_law import power_law

SECONDS_A_WEIGHT_AND_STEP = 1e-8
"""Rough duration in seconds; it only decides whether a progress bar is shown."""
SHARES = (16, 8, 4, 2, 1)
"""The widths are the largest one divided by these."""


@dataclass(frozen=True)
class WideStarts:
    """The certificates by width, and the descent from the widest start with the certified step, if there is one."""

    widths: list[int]
    certificates: list[DescentCertificate]
    path: Descent | None

    @property
    def widest(self) -> DescentCertificate:
        """The certificate of the largest width."""
        return self.certificates[-1]

    @property
    def exponent(self) -> float:
        """Exponent p of score ~ width^p, for gradient flow."""
        return power_law(self.widths, [each.flow.measured for each in self.certificates]).exponent

    def checks(self) -> list[Check]:
        """Check the criterion at the largest width, the bounds that it implies, and that the proven score grows with the width."""
        widest, width = self.widest, self.widths[-1]
        found = [
            Check(
                f"random weights, {width} units: {widest.criterion.asks}", SOURCE, widest.holds,
                f"{widest.criterion.verdict}: {widest.criterion.reason}; by {widest.alpha.method}", must=False,
            ),
            Check(
                "random weights: the proven score grows with the width", SOURCE, self.exponent > 0,
                f"as width^{self.exponent:.2f} for gradient flow",
            ),
        ]  # fmt: skip
        if self.path is not None:
            found += [
                Check.of(each, "random weights, certified step") for each in judge_path(self.path, certificate=widest)
            ]
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return one table row per width: column -> value (certificate of the random network of that width)."""
        return [
            {
                "units": width, "r": each.radius, "alpha >=": each.alpha.lower, "by": each.alpha.method,
                "score (flow)": each.flow.measured, "score (descent)": each.score, "step h": each.step, "delta per step": each.rate,
            }
            for width, each in zip(self.widths, self.certificates, strict=True)
        ]  # fmt: skip


def wide_starts(data: TwoClasses, widest: int, *, epsilon: float, steps: int, until: float, seed: int) -> WideStarts:
    """Certify random starts of growing width, and descend from the widest.

    Args:
        data: inputs and targets.
        widest: units of the largest network, a multiple of 32.
        epsilon: share of the first-order decrease h |grad f|^2 of a step that curvature may cancel, in (0, 1).
        steps: largest number of steps of the descent.
        until: loss f at which the descent stops.
        seed: seed of the weights.
    """
    widths = [widest // share for share in SHARES]
    certificates = []
    for width in widths:
        model = gaussian_pairs(data.inputs.shape[1], width, seed)
        certificates.append(certify_descent(model, data.inputs, data.targets, epsilon=epsilon))
    if not certificates[-1].holds:
        return WideStarts(widths, certificates, None)
    objective = Objective(model, data.inputs, data.targets, nn.MSELoss())
    seconds = SECONDS_A_WEIGHT_AND_STEP * objective.size * steps
    with progress_bar(f"random weights, {widest} units", seconds, None) as report:
        path = gradient_descent(objective, certificates[-1].step, steps=steps, until=until, report=report)
    return WideStarts(widths, certificates, path)


@torch.no_grad()
def gaussian_pairs(inputs: int, width: int, seed: int) -> nn.Sequential:
    """Return two layers with weights from N(0, 1) and no bias; units come in pairs of opposite sign, so that u = 0."""
    generator = torch.Generator().manual_seed(seed)
    first, last = nn.Linear(inputs, width).double(), nn.Linear(width, 1).double()
    half = torch.randn(width // 2, inputs, generator=generator, dtype=torch.float64)
    signs = torch.randn(width // 2, generator=generator, dtype=torch.float64)
    first.weight.copy_(torch.cat([half, half]))
    last.weight.copy_(torch.cat([signs, -signs])[None])
    for layer in (first, last):
        layer.bias.zero_()
    return nn.Sequential(first, nn.Tanh(), last)
