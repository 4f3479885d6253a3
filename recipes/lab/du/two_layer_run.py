"""One run of the two-layer network by gradient descent, with the quantities of Du et al. and Arora et al."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.reporting.progress import Report, silent
from lightning_conv.theory import DuTwoLayer
from lightning_conv.theory.papers.du import TwoLayerDescent


@dataclass
class Track:
    """Measurements of one run: errors at every step, kernels at every ``every``-th step."""

    width: int
    residuals: list[float] = field(default_factory=list)  # |u(k) - y| at k = 0, 1, ...
    wrong: list[int] = field(default_factory=list)  # samples with sign(u) != y, at every step
    at: list[int] = field(default_factory=list)  # steps k at which the kernel was measured
    lambda_min: list[float] = field(default_factory=list)  # of H(k), lower end of its interval
    drift: list[float] = field(default_factory=list)  # |H(k) - H(0)|_2
    patterns: float = 0.0  # share of activations that changed, at the end
    movement: float = 0.0  # max_r |w_r - w_r(0)|, at the end
    outputs: Tensor = field(default_factory=lambda: torch.empty(0))  # u(0)
    weight: Tensor = field(default_factory=lambda: torch.empty(0))  # W at the end


def train(
    network: DuTwoLayer,
    x: Tensor,
    y: Tensor,
    *,
    eta: float,
    steps: int,
    every: int = 0,
    stop_below: float = 0.0,
    report: Report = silent,
) -> Track:
    """Run gradient descent on S = 1/2 sum (u - y)^2.

    Args:
        network: initialised network.
        x: inputs, (n, d).
        y: targets -1 and 1, (n,).
        eta: step size on S.
        steps: largest number of steps.
        every: number of steps between two measurements of the kernel; the last step is measured too; 0: never.
        stop_below: value of |u - y| / |y| at which the run ends.
        report: called with the share of the steps that is done.
    """
    run, track = TwoLayerDescent(network, x, y), Track(network.width)
    track.outputs = run.outputs.clone()
    initial = run.gram() if every else None
    for k in range(steps + 1):
        track.residuals.append(float(run.residual.norm()))
        track.wrong.append(int((run.outputs.sign() != y).sum()))
        done = k == steps or track.residuals[-1] <= stop_below * float(y.norm())
        if initial is not None and (k % every == 0 or done):
            gram = run.gram()
            track.at.append(k)
            track.lambda_min.append(kernel_spectrum(gram, method="auto").lambda_min.lower)
            track.drift.append(float(torch.linalg.eigvalsh(gram - initial).abs().max()))
        if done:
            break
        run.step(eta)
        report(k / steps)
    track.patterns, track.movement = run.pattern_changes(), float(run.neuron_movement().max())
    track.weight = run.weight()
    return track
