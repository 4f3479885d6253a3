"""Zhang et al. 2017 explained by Arora et al. 2019: one network fits true and random labels, at predicted speeds."""

from __future__ import annotations

from typing import Any

import torch

from lightning_conv.kernels.infinite import h_infinity
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.du.two_layer_run import train
from lightning_conv.recipes.lab.random_labels.figure import draw
from lightning_conv.recipes.lab.random_labels.findings import Fit, checks_of, row
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import equal_parts, progress_bar
from lightning_conv.theory import DuTwoLayer
from lightning_conv.theory.papers.du import generalisation_measure, label_energies, predicted_residuals

SMALL: dict[str, Any] = {"n": 10, "tests": 20, "width": 4096, "steps": 600}
"""Settings with which `run` takes seconds."""


def run(
    *,
    n: int = 50,
    tests: int = 200,
    width: int = 65536,
    kappa: float = 1.0,
    steps: int = 6000,
    stop_below: float = 0.05,
    classes: tuple[int, int] = (3, 8),
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Train the same network, from the same start, on true and on random labels of the same images.

    Cost: about 46 s on 2 cores with the default settings.

    Args:
        n: training samples of two classes, scaled to norm 1.
        tests: test samples of the same classes.
        width: number m of units.
        kappa: scale of the initial hidden weights. The theorem takes a small one, so that u(0) is near 0; here u(0) = 0 for
            any kappa, since neurons come in pairs with opposite output weights, and a larger kappa makes activation
            patterns change less.
        steps: largest number of steps of gradient descent.
        stop_below: value of |u - y| / |y| at which the run ends.
        classes: the two classes of the images.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        seed: seed of the data's order, the weights and the random labels.

    Returns:
        The checks of fit, speed and difficulty, and a table with one row per vector of labels.

    Raises:
        ValueError: there is no step, or the number of samples is odd.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}; need 1 or more")
    if n % 2:
        raise ValueError(f"n: {n}; need an even number, so that the classes are balanced")
    data = two_classes(n + tests, classes=classes, source=source, root=root, seed=seed)
    x, rest = data.inputs[:n], data.inputs[n:]
    limit = h_infinity(x)
    spectrum = kernel_spectrum(limit)
    eta = 1 / spectrum.lambda_max.value
    random = torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed + 1)).double() * 2 - 1
    fits = {}
    # The duration (2e-10 s per operation) only decides whether a bar is shown.
    with progress_bar("gradient descent on true and on random labels", 2 * steps * width * n * n * 2e-10, None) as bar:
        for (name, y), part in zip(
            {"true": data.targets[:n], "random": random}.items(), equal_parts(bar, 2), strict=True
        ):
            network = DuTwoLayer(x.shape[1], width, kappa=kappa, symmetric=True, seed=seed)
            track = train(network, x, y, eta=eta, steps=steps, stop_below=stop_below, report=part)
            with torch.no_grad():
                network.hidden.weight.copy_(track.weight)
                wrong = network(rest).sign() != data.targets[n:]
            fits[name] = Fit(
                labels=y,
                track=track,
                predicted=predicted_residuals(limit, y, eta, range(len(track.residuals))),
                shares=label_energies(limit, y)[1],
                measure=generalisation_measure(limit, y),
                test_error=float(wrong.double().mean()),
            )
    return Report(
        name="random_labels",
        title="One network fits true and random labels, and the kernel says how fast",
        setting=(
            f"The two-layer ReLU network of {width:,} units (output weights fixed, hidden ones from N(0, {kappa**2:g}), neurons in pairs "
            f"with opposite output weights, so that u(0) = 0), {n} samples of {source}, classes {classes[0]} and {classes[1]}, scaled to "
            f"norm 1; full-batch gradient descent on S = 1/2 sum (u - y)^2 with eta = 1 / lambda_max(H_inf) = {eta:.4g}, until |u - y| is "
            f"{stop_below} of |y| or {steps:,} steps. Predicted: sqrt(sum_i (1 - eta lambda_i)^(2k) (v_i . y)^2) with eigenvalues and "
            f"eigenvectors of H_inf, from the images and labels alone, before any training. lambda_0 = {spectrum.lambda_min.value:.4g}."
        ),
        checks=checks_of(fits),
        tables={"Both label vectors": [row(name, fit) for name, fit in fits.items()]},
        figure=draw(fits, spectrum.all_eigenvalues().flip(0)),
        data={
            name: {
                "residuals": fit.track.residuals,
                "predicted": fit.predicted,
                "wrong": fit.track.wrong,
                "shares": fit.shares,
            }
            for name, fit in fits.items()
        },
    )
