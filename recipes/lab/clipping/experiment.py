"""Tucat et al. 2025 on real digits: the three regimes of delta-GClip, its bounds at every step, and where it helps.

delta-GClip is gradient descent with the step eta min(1, max(delta, gamma / |grad f|)): clipping with a floor delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.recipes.lab.clipping.figure import draw
from lightning_conv.recipes.lab.clipping.findings import Checked, comparison
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.papers.clipping import ClippedPath, clipping_criteria, clipping_factor


@dataclass(frozen=True)
class Problem:
    """The mean of half squared errors over n samples, f = (1 / 2n) sum (u - y)^2 = S / n."""

    network: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self) -> Tensor:
        """Return f."""
        residual: Tensor = self.network(self.inputs)[:, 0] - self.targets
        return residual.square().sum() / (2 * len(self.targets))

    def constants(self) -> tuple[float, float]:
        """Return bounds (mu, beta) proven for the current kernel: mu <= 2 lambda_min / n and beta >= lambda_max / n."""
        spectrum = kernel_spectrum(ntk_gram(self.network, self.inputs, precision="certified"))
        n = len(self.targets)
        return 2 * spectrum.lambda_min.lower / n, spectrum.lambda_max.upper / n


DIVERGED = 1e6
"""Loss from which on a run counts as diverged."""

SMALL: dict[str, Any] = {"n": 6, "width": 32, "steps": 40, "sweep": 2}
"""Settings with which `run` takes seconds."""


def run(
    n: int = 20,
    width: int = 512,
    beta: float = 20.0,
    head_scale: float = 5.0,
    delta: float = 0.2,
    threshold: float = 0.05,
    steps: int = 3000,
    sweep: int = 10,
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Run delta-GClip on a wide network and on its last layer alone.

    Cost: about 39 s on 2 cores with the default settings.

    Args:
        n: images of the digits 3 and 8, half of them of each.
        width: number of hidden units.
        beta: sharpness of the softplus.
        head_scale: factor on the head's initial weights; a large one makes the curvature at the start large.
        delta: floor of the clipping factor.
        threshold: gamma over the norm of the first gradient, below delta, so that the floor is reached.
        steps: number of steps of the runs that are checked against their bounds.
        sweep: number of learning rates in the comparison.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        seed: seed of the initial weights.

    Returns:
        The checks of both runs and of the comparison, and tables of the two runs and of the losses by learning rate.

    Raises:
        ValueError: there is no step or no learning rate, or the threshold is not below delta.
    """
    if steps < 1 or sweep < 1:
        raise ValueError(f"steps, sweep: {steps}, {sweep}; need 1 or more of each")
    if not 0 < threshold < delta <= 1:
        raise ValueError(f"threshold, delta: {threshold}, {delta}; need 0 < threshold < delta <= 1")
    data = two_classes(n, source=source, root=root)

    def wide() -> Problem:
        torch.manual_seed(seed)
        first, head = nn.Linear(data.inputs.shape[1], width), nn.Linear(width, 1)
        with torch.no_grad():
            head.weight.mul_(head_scale)
        network = nn.Sequential(first, nn.Softplus(beta), head).double()
        return Problem(network, data.inputs, data.targets)

    def last_layer() -> Problem:
        whole = wide()
        with torch.no_grad():
            features = whole.network[:2](data.inputs)  # type: ignore[index]
        return Problem(whole.network[2], features, data.targets)  # type: ignore[index]

    with torch.random.fork_rng(devices=[]):
        linear = _checked(last_layer(), delta, threshold, steps, proven=True)
        network = _checked(wide(), delta, threshold, steps, proven=False)
        relative = torch.logspace(-1, 2, sweep, dtype=torch.float64).tolist()
        rates = [rate / wide().constants()[1] for rate in relative]
        ends = _sweep(wide(), rates, network.path.gamma, delta, min(steps, 1000))
    checks = [*linear.checks("last layer alone"), *network.checks("wide network")]
    checks.append(comparison(ends))
    tables = {
        "The two runs": [linear.row("last layer alone"), network.row("wide network")],
        "Loss after the sweep's steps": [
            {"eta lambda_max / n": rate} | {name: values[i] for name, values in ends.items()} for i, rate in enumerate(relative)
        ],
    }  # fmt: skip
    setting = (
        f"{n} images of {source} (3 and 8, rows of norm 1, targets -1 and 1), f = (1 / 2n) sum (u - y)^2, full batch, float64. Network: "
        f"{data.inputs.shape[1]} - {width} softplus({beta:g}) - 1, the head's initial weights times {head_scale:g}. gamma = {threshold:g} "
        f"|grad f_0|, delta = {delta:g}.\n\n*Last layer alone*: f is a quadratic, beta = lambda_max(G) / n and mu = 2 lambda_min(G) / n "
        "are proven bounds, eta = 1 / beta: every hypothesis of the theorem is proven, so every inequality must hold.\n\n*Wide network*: "
        "mu is the smallest of the proven 2 lambda_min(G_t) / n over all iterates of this very run, so it is known afterwards only; "
        "smoothness is not proven, eta = 1 / (2 beta_0) with beta_0 = lambda_max(G_0) / n, and the descent that it would give is "
        f"measured at every step instead.\n\n*Sweep*: the wide network, {min(steps, 1000)} steps with each learning rate."
    )
    return Report(
        "clipping", "delta-GClip: three regimes, one rate", setting, checks, tables, draw(network, relative, ends),
        {"losses": network.path.losses[:: max(1, steps // 500)], "sweep": ends},
    )  # fmt: skip


def _checked(problem: Problem, delta: float, threshold: float, steps: int, *, proven: bool) -> Checked:
    """Run delta-GClip and judge it; mu is the smallest over all iterates unless the hypotheses are proven beforehand."""
    mu, smoothness = problem.constants()
    eta = 1 / smoothness if proven else 0.5 / smoothness
    gamma = threshold * descend(problem, eta, 1.0, 1.0, 1).norms[0]
    smallest = [mu]
    # Roughly 0.01 s per step; it only decides whether a bar is shown.
    with progress_bar("delta-GClip, lambda_min at every step", 0.01 * steps, None) as report:

        def measure() -> None:
            smallest.append(problem.constants()[0])
            report(len(smallest) / steps)

        path = descend(problem, eta, gamma, delta, steps, each=None if proven else measure)
    if min(smallest) <= 0:
        raise ValueError(
            "n, width: lambda_min of the kernel is not above its rounding error, so there is no mu; use fewer samples"
        )
    return Checked(path, min(smallest), clipping_criteria(path, min(smallest)), proven)


def descend(
    problem: Problem, eta: float, gamma: float, delta: float, steps: int, each: Callable[[], None] | None = None
) -> ClippedPath:
    """Run delta-GClip on the full batch and put the weights back; call ``each`` after every step."""
    parameters = [p for p in problem.network.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    losses, norms = [], []
    for _ in range(steps):
        loss = problem.loss()
        gradients = torch.autograd.grad(loss, parameters)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        losses.append(float(loss.detach()))
        norms.append(norm)
        if not losses[-1] < DIVERGED:
            break
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=eta * clipping_factor(norm, gamma=gamma, delta=delta))
        if each is not None:
            each()
    losses.append(float(problem.loss().detach()))
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return ClippedPath(eta, gamma, delta, losses, norms)


def _sweep(problem: Problem, rates: Sequence[float], gamma: float, delta: float, steps: int) -> dict[str, list[float]]:
    """Return, by method, the loss after ``steps`` steps at each learning rate; infinite where the run diverged."""
    methods = {"gradient descent": (gamma, 1.0), "clipping": (gamma, 0.0), "delta-GClip": (gamma, delta)}
    ends: dict[str, list[float]] = {}
    for name, (level, floor) in methods.items():
        last = [descend(problem, rate, level, floor, steps).losses[-1] for rate in rates]
        ends[name] = [loss if loss < DIVERGED else math.inf for loss in last]
    return ends
