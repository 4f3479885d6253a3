"""Yang et al. 2023: a constant initial bias makes the activation sparse, but does not slow training down."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_conv import ntk_gram, smallest_eigenvalue
from lightning_conv.losses.squared import half_sum_of_squares
from lightning_conv.recipes.lab.bias_ntk.figure import draw
from lightning_conv.recipes.lab.bias_ntk.findings import Run, checks_of, row
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.networks import BiasedTwoLayer
from lightning_conv.theory.papers.bias_ntk import active_probability, bias_ntk
from lightning_conv.theory.tools.activations import activation_patterns

SMALL: dict[str, Any] = {"n": 10, "width": 256, "thresholds": (0.0, 1.0), "max_steps": 30}
"""Settings with which `run` takes seconds."""


def run(
    n: int = 60,
    width: int = 8192,
    thresholds: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0),
    rate: float = 0.5,
    stop_at: float = 0.01,
    max_steps: int = 2000,
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Train one network per threshold B, with step size rate / lambda_max(H(B)), until F <= ``stop_at`` F(0).

    Cost: about 270 s on 2 cores with the default settings.

    Args:
        n: samples, half of each of two classes.
        width: number m of units.
        thresholds: values of B >= 0; the first is the reference (0: the dense network).
        rate: step size in units of 1 / lambda_max(H(B)); the linearised model diverges from 2 on.
        stop_at: value of F / F(0) at which training ends.
        max_steps: largest number of steps.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        seed: seed of the initialisation; w and a are the same for all B.

    Returns:
        The checks of the kernel, the sparsity and the speed, and a table by threshold.

    Raises:
        ValueError: there are fewer than two thresholds, or a setting is out of range.
    """
    if len(thresholds) < 2 or min(thresholds) < 0 or not 0 < stop_at < 1 or not 0 < rate < 2 or max_steps < 1:
        raise ValueError(
            f"thresholds, rate, stop_at, max_steps: {thresholds}, {rate}, {stop_at}, {max_steps}; need two or more B >= 0, a rate below 2, "
            "a share and a positive number"
        )
    data = two_classes(n, source=source, root=root)
    runs = []
    # 60 s: a rough duration; it only decides whether a bar is shown (``progress.LONG``).
    with progress_bar("training", 60.0, None) as report:
        for k, threshold in enumerate(thresholds):
            net = BiasedTwoLayer(data.inputs.shape[1], width, threshold, seed=seed)
            runs.append(_train(net, data.inputs, data.targets, rate, stop_at, max_steps))
            report((k + 1) / len(thresholds))
    setting = (
        f"{n} images of {source} (3 against 8), unit norm; f = (1/sqrt m) sum a_r relu(w_r . x - b_r), m = {width}, b_r = B at the start, "
        "w and b trained, a fixed; F = (1/2) sum (f - y)^2 with y = f at the start -1 or +1, so that every B begins with the same "
        f"errors; plain gradient descent on all samples, eta = {rate:g} / lambda_max(H(B)) for each B, until F <= {stop_at:g} F(0); "
        f"float64. The paper's largest B for this width is sqrt(0.5 ln m) = {math.sqrt(0.5 * math.log(width)):.2f}. The width that it "
        "asks for is not reached and its constants are unspecified: only the mechanism is tested."
    )
    return Report(
        name="bias_ntk",
        title="Yang et al. 2023: sparse activation by a constant bias, and its kernel",
        setting=setting,
        checks=checks_of(runs, max_steps),
        tables={"By threshold": [row(r) for r in runs]},
        figure=draw(runs),
        data={
            "runs": [
                {"threshold": r.threshold, "losses": r.losses, "probed": r.probed, "active": r.mean_active}
                for r in runs
            ]
        },
    )


def _train(net: BiasedTwoLayer, x: Tensor, y: Tensor, rate: float, stop_at: float, max_steps: int) -> Run:
    """Train the network of one threshold B until F <= ``stop_at`` F(0)."""
    kernel = bias_ntk(x, net.threshold)
    values, vectors = torch.linalg.eigh(kernel)
    eta, weights = rate / float(values[-1]), (vectors.T @ y).square() / 2
    start, width = activation_patterns(net, x), net.hidden.out_features
    with torch.no_grad():
        target = y + net(x).flatten()  # so that the error at the start is y for every B
    probed, mean_active, most_active, losses = [], [], [], []
    for step in range(max_steps + 1):
        here = half_sum_of_squares(net, x, target)
        losses.append(here.loss)
        done = here.loss <= stop_at * losses[0] or step == max_steps
        if done or step in (0, 1, 2, 5) or step % 10 == 0:
            active = activation_patterns(net, x).layers[0].active_fraction
            probed.append(step)
            mean_active.append(float(active.mean()))
            most_active.append(float(active.max()))
        if step == 0:
            deviation, share_error = _standard_errors(ntk_gram(net, x).matrix, kernel, x, active, net.threshold, width)
        if done:
            break
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.sub_(here.gradient[name], alpha=eta)
    times = torch.arange(len(losses), dtype=torch.float64)[:, None]
    predicted = ((1 - eta * values) ** (2 * times) @ weights).tolist()
    later = torch.arange(4 * max_steps, dtype=torch.float64)[:, None]
    reached = ((1 - eta * values) ** (2 * later) @ weights) <= losses[-1]
    predicted_steps = max(int(reached.double().argmax()), 1) if bool(reached.any()) else len(later)
    return Run(
        threshold=net.threshold,
        eta=eta,
        kernel=kernel,
        smallest=smallest_eigenvalue(kernel),
        largest=float(values[-1]),
        deviation=deviation,
        share_error=share_error,
        losses=losses,
        predicted=predicted,
        predicted_steps=predicted_steps,
        probed=probed,
        mean_active=mean_active,
        most_active=most_active,
        switched=float(activation_patterns(net, x).changed_fraction(start)[0]),
    )


def _standard_errors(
    gram: Tensor, kernel: Tensor, x: Tensor, active: Tensor, threshold: float, width: int
) -> tuple[float, float]:
    """Return the largest deviations of the NTK from H(B) and of the active share from 1 - Phi(B), in standard errors."""
    size = x @ x.T + 1
    p = kernel / size
    error = size * (p * (1 - p) / width).sqrt()
    q = active_probability(threshold)
    share = float((active - q).abs().max()) / math.sqrt(q * (1 - q) / width)
    return float(((gram - kernel).abs() / error).max()), share
