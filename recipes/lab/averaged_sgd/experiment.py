"""Nitanda & Suzuki 2021: averaged SGD in one pass over the digits, and the spectrum of the NTK behind its rate."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from lightning_conv.recipes.lab.averaged_sgd.figure import draw
from lightning_conv.recipes.lab.averaged_sgd.findings import checks_of
from lightning_conv.recipes.lab.averaged_sgd.one_pass import Pass, network_of, one_pass, parity
from lightning_conv.recipes.lab.data import Source
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.papers.averaged_sgd import degrees_of_freedom, largest_step, spectrum_decay

SMALL: dict[str, Any] = {"n": 60, "width": 16, "widths": (16,), "runs": 2, "last": 30}
"""Settings with which `run` takes seconds."""


def run(
    n: int = 1437,
    width: int = 1024,
    widths: tuple[int, ...] = (64, 256, 1024),
    noise: float = 0.3,
    sharpness: float = 64.0,
    runs: int = 5,
    penalty: float | None = None,
    first: int = 3,
    last: int = 200,
    source: Source = "digits",
    root: str = "data",
) -> Report:
    """Run one pass of SGD over n images from several seeds and compare the averaged iterate with the last one.

    Cost: about 27 s on 2 cores with the default settings.

    Args:
        n: number of training samples, and of steps, as each sample is used once.
        width: number M of units of the runs that are compared.
        widths: values of M at which the network is compared with its linearisation.
        noise: share of training labels that are flipped in the second comparison.
        sharpness: beta of the softplus s; the theorem requires a bound of s'', and |s''| <= beta / 4.
        runs: number of seeds; each draws its own initialisation and order of the samples.
        penalty: lambda; None: T^(-beta / (2 r beta + 1)) of Corollary 1 with r = 1/2 and the measured beta.
        first: rank of the first eigenvalue that the decay is fitted to.
        last: rank of the last eigenvalue of the fit.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.

    Returns:
        The checks of hypotheses, bounds and rate, and tables of the errors by width and of the kernel's degrees of
        freedom by lambda.

    Raises:
        ValueError: fewer than two runs, too few samples, or ``noise`` outside [0, 0.5).
    """
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise: {noise}; need a share in [0, 0.5); from 0.5 on the labels say the opposite")
    if runs < 2:
        raise ValueError(f"runs: {runs}; need two or more to estimate how far they scatter")
    data = parity(n, source, root)
    n = len(data.inputs)
    network = network_of(data, max(widths), sharpness, torch.Generator().manual_seed(0))
    eigenvalues = torch.linalg.eigvalsh(network.kernel(data.inputs) / n)
    floor = n * torch.finfo(torch.float64).eps * float(eigenvalues[-1])
    decay = spectrum_decay(eigenvalues, first=first, last=min(last, n // 2), floor=floor)
    penalty = decay.penalty(n) if penalty is None else penalty
    passes: dict[int, list[Pass]] = {}
    total = runs * (len({*widths, width}) + 1)
    with progress_bar("averaged SGD", 2.0 * total, None) as report:  # roughly 2 s per pass
        for size in sorted({*widths, width}):
            passes[size] = []
            for seed in range(runs):
                passes[size].append(one_pass(data, size, sharpness, penalty, 0.0, seed))
                report(sum(map(len, passes.values())) / total)
        noisy = [one_pass(data, width, sharpness, penalty, noise, seed) for seed in range(runs)]
    chosen = passes[width]
    gaps = {size: fmean([each.gap for each in passes[size]]) for size in widths}
    start = float(network(data.test_inputs).detach().abs().max())
    checks = checks_of(decay, eigenvalues, penalty, {0.0: chosen, noise: noisy}, gaps, start)
    rows = [
        {
            "width": size, "labels flipped": f"{share:.0%}",
            "test error, last": fmean([p.last[-1] for p in each]), "test error, averaged": fmean([p.averaged[-1] for p in each]),
            "wrong signs, last": fmean([p.wrong[0] for p in each]), "wrong signs, averaged": fmean([p.wrong[1] for p in each]),
            "distance to start": fmean([p.distance for p in each]), "gap to the linearised network": fmean([p.gap for p in each]),
        }
        for size, share, each in [*((size, 0.0, each) for size, each in passes.items()), (width, noise, noisy)]
    ]  # fmt: skip
    freedom = [
        {
            "lambda": value, "degrees of freedom": degrees_of_freedom(eigenvalues, value),
            "bound Tr(K/n) / lambda": float(eigenvalues.sum()) / value,
        }
        for value in (1.0, 0.1, penalty, 1e-3, 1e-4)
    ]  # fmt: skip
    setting = (
        f"Even against odd images of {source} (targets 1 and -1, rows of norm 1), {n} for training and {len(data.test_inputs)} for "
        f"testing. Two layers of M softplus({sharpness:g}) units with the symmetric initialisation, all parameters trained; one pass of "
        f"SGD, one sample per step, on 1/2 (g(x) - y)^2 + (lambda/2) |theta - theta_0|^2 with lambda = {penalty:.4g} and the largest "
        f"constant step of the theorem, eta = {largest_step(penalty):.4g}. Errors are means of (g(x) - g_rho(x))^2 on the test set, over "
        f"{runs} seeds; g_rho is the mean label, y itself or, where a share p of the training labels is flipped, (1 - 2p) y. The "
        "linearised network is the same SGD on g's tangent at theta_0, exactly, through its kernel."
    )
    return Report(
        "averaged_sgd", "Averaged SGD under the NTK", setting, checks,
        {"By width": rows, "Degrees of freedom of the kernel on the training set": freedom},
        draw(eigenvalues, decay, {0.0: chosen, noise: noisy}, gaps, width), {"beta": decay.beta, "gaps": gaps, "steps": chosen[0].steps},
    )  # fmt: skip
