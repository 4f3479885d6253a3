"""Linear networks: gradient flow conserves the balancedness, and a small start learns one direction after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_conv.recipes.data import DigitsDataModule
from lightning_conv.recipes.lab.linear_networks.figure import draw
from lightning_conv.recipes.lab.linear_networks.findings import Drift, Path, checks_of, drift_row, plain, row
from lightning_conv.recipes.lab.report import Report
from lightning_conv.theory.networks import LinearNetwork
from lightning_conv.theory.papers.linear_networks import (
    balancedness,
    balancedness_step,
    drift_bound,
    end_to_end,
    mode_strength,
    stays_balanced,
)
from lightning_conv.theory.tools.matrix_norms import effective_rank
from lightning_conv.theory.tools.power_law import power_law

Gradients = Callable[[Sequence[Tensor]], list[Tensor]]


SMALL: dict[str, Any] = {"samples": 200, "width": 12, "duration": 2.0, "etas": (0.2, 0.1), "rank_steps": 100}
"""Settings with which `run` takes seconds."""


def run(
    samples: int = 1000,
    width: int = 32,
    depth: int = 3,
    duration: float = 8.0,
    etas: tuple[float, ...] = (0.2, 0.1, 0.05, 0.025),
    small: float = 1e-3,
    depths: tuple[int, ...] = (1, 2, 3),
    rank_steps: int = 4000,
    seed: int = 0,
) -> Report:
    """Regress the ten one-hot labels of digits on whitened pixels with a product of matrices.

    Cost: about 4 s on 2 cores with the default settings.

    Args:
        samples: number of images.
        width: units per hidden layer.
        depth: number L of layers of the network whose balancedness is followed.
        duration: time T (steps times eta) of every run for the balancedness.
        etas: step sizes, the largest first.
        small: initial size of the singular values of the product in the runs whose rank is followed.
        depths: values of L of the networks whose rank is followed.
        rank_steps: largest number of steps of these networks.
        seed: seed of the initialisations.

    Returns:
        The checks of the balancedness, the modes and the rank, and tables by step size and by depth.

    Raises:
        ValueError: the depth is below 2, or there are fewer than two step sizes.
    """
    if depth < 2 or len(etas) < 2 or min(depths) < 1:
        raise ValueError(
            f"depth, etas, depths: {depth}, {etas}, {depths}; need depth 2 or more and two step sizes or more"
        )
    target = _target(samples, seed)
    drifts = [_drift(target, width, depth, duration, eta, seed) for eta in etas]
    law = power_law([d.eta for d in drifts], [d.moved for d in drifts])
    paths = [_path(target, width, layers, small, rank_steps, seed) for layers in depths]
    modes, exact, off = _modes(target, small)
    setting = (
        f"{samples} digits; pixels centred and whitened on the directions that vary, ten one-hot labels centred, so that the loss (1/2n) "
        f"sum |W_L...W_1 x - y|^2 is (1/2)|W_L...W_1 - M|_F^2 plus a constant, M = Y^T X / n, {target.shape[0]} x {target.shape[1]}; "
        f"hidden width {width}; plain gradient descent, float64. Balancedness: L = {depth}, Gaussian start that is not balanced, time T = "
        f"{duration:g} at every step size. Rank: balanced random start, singular values of the product {small:g}."
    )
    return Report(
        name="linear_networks",
        title="Linear networks: balancedness is conserved, rank grows step by step",
        setting=setting,
        checks=checks_of(drifts, law, paths, off),
        tables={
            f"Balancedness at time {duration:g}": [drift_row(d) for d in drifts],
            "Rank of the product": [row(path) for path in paths],
        },
        figure=draw(drifts, law, paths, modes, exact),
        data={"singular_values_of_M": torch.linalg.svdvals(target), "paths": [plain(p) for p in paths]},
    )


def _target(samples: int, seed: int) -> Tensor:
    """Return M = Y^T X / n for whitened inputs, the matrix that the product is fitted to."""
    data = DigitsDataModule(seed=seed)
    data.setup()
    images, labels = data.splits.train.tensors
    x = images[:samples].double().flatten(1)
    y = torch.nn.functional.one_hot(labels[:samples], 10).double()
    x, y = x - x.mean(0), y - y.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = values > 1e-3 * values[-1]
    target: Tensor = y.T @ (x @ vectors[:, kept] / values[kept].sqrt()) / len(x)
    return target


def gradients_for(target: Tensor) -> Gradients:
    """Return the function that computes dL/dW_l of L = (1/2)|W_L...W_1 - M|_F^2: A^T (P - M) B^T with P = A W_l B."""

    def gradients(weights: Sequence[Tensor]) -> list[Tensor]:
        before = [torch.eye(weights[0].shape[1], dtype=target.dtype)]
        for weight in weights:
            before.append(weight @ before[-1])
        back, found = before[-1] - target, []
        for weight, below in zip(weights[::-1], before[-2::-1], strict=True):
            found.append(back @ below.T)
            back = weight.T @ back
        return found[::-1]

    return gradients


def _drift(target: Tensor, width: int, depth: int, duration: float, eta: float, seed: int) -> Drift:
    """Measure the change of the balancedness over one run of a fixed time."""
    sizes = [target.shape[1], *[width] * (depth - 1), target.shape[0]]
    weights = [w.clone() for w in LinearNetwork(sizes, std=0.5 / math.sqrt(width), seed=seed).weights]
    gradients = gradients_for(target)
    start, before = [w.clone() for w in weights], balancedness(weights)
    added, bound = [torch.zeros_like(d) for d in before], 0.0
    steps = round(duration / eta)
    for _ in range(steps):
        g = gradients(weights)
        bound += drift_bound(g, eta)
        added = [total + part for total, part in zip(added, balancedness_step(g, eta), strict=True)]
        weights = [w - eta * part for w, part in zip(weights, g, strict=True)]
    now = balancedness(weights)
    off = max(float((d - b - a).norm() / b.norm()) for d, b, a in zip(now, before, added, strict=True))
    return Drift(eta, steps, stays_balanced(weights, start, bound).measured, bound, off)


def _path(target: Tensor, width: int, depth: int, small: float, most: int, seed: int) -> Path:
    """Follow the rank of the product of one network in training."""
    sizes = [target.shape[1], *[width] * (depth - 1), target.shape[0]]
    net = LinearNetwork(sizes, std=small ** (1 / depth), balanced=True, seed=seed)
    weights, gradients = [w.clone() for w in net.weights], gradients_for(target)
    eta = 0.1 / float(torch.linalg.matrix_norm(target, 2)) ** (2 - 2 / depth) / depth
    path = Path(depth, [], [], [], [])
    least = 0.0
    for step in range(most + 1):
        product = end_to_end(weights)
        loss = float((product - target).square().sum()) / 2
        if step == 0:
            least = 0.01 * loss
        if step % max(most // 1000, 1) == 0 or loss <= least or step == most:
            path.time.append(step * eta)
            path.loss.append(loss)
            path.values.append(torch.linalg.svdvals(product))
            path.rank.append(effective_rank(product))
        if loss <= least:
            break
        weights = [w - eta * part for w, part in zip(weights, gradients(weights), strict=True)]
    return path


def _modes(target: Tensor, small: float, eta: float = 0.01) -> tuple[Tensor, Tensor, float]:
    """Return the modes of a two-layer product aligned with M, their closed form, and the largest difference over s."""
    left, strength, right = torch.linalg.svd(target, full_matrices=False)
    k = int((strength > 1e-6 * strength[0]).sum())
    weights = [math.sqrt(small) * right[:k], math.sqrt(small) * left[:, :k]]
    gradients = gradients_for(target)
    steps = round(2 * math.log(float(strength[k - 1]) / small) / float(strength[k - 1]) / eta)
    every = max(steps // 200, 1)
    measured, times = [], []
    for step in range(steps + 1):
        if step % every == 0:
            measured.append((left[:, :k].T @ end_to_end(weights) @ right[:k].T).diagonal())
            times.append(step * eta)
        weights = [w - eta * part for w, part in zip(weights, gradients(weights), strict=True)]
    time = torch.tensor(times, dtype=torch.float64)
    found = torch.stack(measured)
    exact = torch.stack([mode_strength(time, small, float(s)) for s in strength[:k]], 1)
    off = float(((found - exact).abs() / strength[:k]).max())
    return torch.cat([time[:, None], found], 1), exact, off
