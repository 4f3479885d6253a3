"""`lab random-labels`: Zhang et al. 2017 explained by Arora et al. 2019: one network fits true and random labels, at predicted speeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.kernels.infinite import h_infinity
from lightning_conv.linalg.spectrum import kernel_spectrum
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.du.two_layer_run import Track, train
from lightning_conv.recipes.lab.panel import dress
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.plots import new_figure
from lightning_conv.reporting.progress import equal_parts, progress_bar
from lightning_conv.theory import DuTwoLayer
from lightning_conv.theory.papers.du import generalisation_measure, label_energies, predicted_residuals

ARORA = "Arora, Du, Hu, Li, Wang 2019 (1901.08584)"
ZHANG = "Zhang, Bengio, Hardt, Recht, Vinyals 2017 (1611.03530)"
FACTOR = 1.5
"""Between the measured and the predicted number of steps to a share of |y|, for the prediction to count as one."""

SHARES = (0.5, 0.2, 0.1)
"""Of |y|, at which the numbers of steps are compared."""

COLOURS = {"true": "tab:blue", "random": "tab:red"}


@dataclass(frozen=True)
class Fit:
    """One label vector, and what became of it."""

    labels: Tensor
    track: Track
    predicted: Tensor  # |y - u(k)| at every step
    shares: Tensor  # of |y|^2 on each eigenvector, descending eigenvalues
    measure: float
    test_error: float

    @property
    def distance(self) -> float:
        """Largest |measured - predicted| / |y| over all steps."""
        measured = torch.tensor(self.track.residuals, dtype=torch.float64)
        return float((measured - self.predicted).abs().max() / self.labels.norm())

    def steps_to(self, share: float, curve: Sequence[float]) -> int | None:
        """The first step at which a curve is at most that share of |y|."""
        target = share * float(self.labels.norm())
        return next((k for k, value in enumerate(curve) if value <= target), None)

    def paces(self) -> dict[float, tuple[int | None, int | None]]:
        """Share of |y| -> steps to it, measured and predicted; what neither curve reaches is left out."""
        curves = self.track.residuals, self.predicted.tolist()
        found = {share: (self.steps_to(share, curves[0]), self.steps_to(share, curves[1])) for share in SHARES}
        return {share: pair for share, pair in found.items() if pair != (None, None)}

    @property
    def factor(self) -> float:
        """The largest ratio of measured and predicted numbers of steps, either way; a curve that ends too early counts with its end."""
        end = len(self.track.residuals)
        pairs = [(max(end if k is None else k, 1), max(end if p is None else p, 1)) for k, p in self.paces().values()]
        return max((max(k / p, p / k) for k, p in pairs), default=math.nan)


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
    """The same network, from the same start, on true and on random labels of the same images.

    Args:
        n: training samples of two classes, scaled to norm 1.
        tests: test samples of the same classes.
        width: m.
        kappa: scale of the hidden weights at the start. The theorem needs u(0) near 0, by a small one; here u(0) = 0 at any,
            since neurons come in pairs with opposite output weights, and activation patterns change less at a larger one.
        steps: of gradient descent at most.
        stop_below: end where |u - y| is this share of |y|.
        classes: of the data.
        source: digits, or mnist that lies on disk.
        root: folder of mnist.
        seed: of the data's order, the weights and the random labels.

    Raises:
        ValueError: steps below 1, or odd numbers of samples.
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
        name="random-labels",
        title="One network fits true and random labels, and the kernel says how fast",
        setting=(
            f"The two-layer ReLU network of {width:,} units (output weights fixed, hidden ones from N(0, {kappa**2:g}), neurons in pairs "
            f"with opposite output weights, so that u(0) = 0), {n} samples of {source}, classes {classes[0]} and {classes[1]}, scaled to "
            f"norm 1; full-batch gradient descent on S = 1/2 sum (u - y)^2 with eta = 1 / lambda_max(H_inf) = {eta:.4g}, until |u - y| is "
            f"{stop_below} of |y| or {steps:,} steps. Predicted: sqrt(sum_i (1 - eta lambda_i)^(2k) (v_i . y)^2) with eigenvalues and "
            "eigenvectors of H_inf, from the images and labels alone, before any training. "
            f"lambda_0 = {spectrum.lambda_min.value:.4g}."
        ),
        checks=_checks(fits),
        tables={"Both label vectors": [_row(name, fit) for name, fit in fits.items()]},
        figure=_draw(fits, spectrum.all_eigenvalues().flip(0)),
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


def _row(name: str, fit: Fit) -> dict[str, object]:
    return {
        "labels": name,
        "steps": len(fit.track.residuals) - 1,
        "training error at the end": fit.track.wrong[-1] / len(fit.labels),
        "steps to |y| / 2, measured": fit.steps_to(0.5, fit.track.residuals),
        "steps to |y| / 2, predicted": fit.steps_to(0.5, fit.predicted.tolist()),
        "steps to |y| / 10, measured": fit.steps_to(0.1, fit.track.residuals),
        "steps to |y| / 10, predicted": fit.steps_to(0.1, fit.predicted.tolist()),
        "largest factor of the steps": fit.factor,
        "largest distance of the curves / |y|": fit.distance,
        "sqrt(2 y^T H_inf^-1 y / n)": fit.measure,
        "test error": fit.test_error,
        "patterns changed": fit.track.patterns,
    }


def _checks(fits: dict[str, Fit]) -> list[Check]:
    true, random = fits["true"], fits["random"]
    checks = [
        Check(
            f"zero training error on {name} labels",
            ZHANG,
            fit.track.wrong[-1] == 0,
            f"{fit.track.wrong[-1]} of {len(fit.labels)} wrong after {len(fit.track.residuals) - 1:,} steps; "
            f"|u - y| = {fit.track.residuals[-1]:.3g}",
        )
        for name, fit in fits.items()
    ]
    checks += [
        Check(
            f"steps to {', '.join(f'{share:g}' for share in fit.paces())} |y| on {name} labels as predicted, within a factor {FACTOR:g}",
            f"{ARORA}, Theorem 4.1",
            fit.factor <= FACTOR,
            ", ".join(f"{k} for {p}" for k, p in fit.paces().values())
            + f"; largest distance of the curves {fit.distance:.4f} |y|",
        )
        for name, fit in fits.items()
    ]
    mid = min(len(true.track.residuals), len(random.track.residuals)) // 10
    slower = [fit.track.residuals[mid] / fit.track.residuals[0] for fit in (true, random)]
    expected = [float(fit.predicted[mid] / fit.predicted[0]) for fit in (true, random)]
    checks += [
        Check(
            "random labels are fitted more slowly, as predicted",
            f"{ARORA}, section 4",
            slower[0] < slower[1] and expected[0] < expected[1],
            f"|u - y| / |y| after {mid} steps: {slower[0]:.3f} and {slower[1]:.3f}; predicted {expected[0]:.3f} and {expected[1]:.3f}",
        ),
        Check(
            "the measure sqrt(2 y^T H_inf^-1 y / n) and the test error are both larger for random labels",
            f"{ARORA}, Theorem 5.1",
            true.measure < random.measure and true.test_error < random.test_error,
            f"measure {true.measure:.3g} and {random.measure:.3g}, test error {true.test_error:.3f} and {random.test_error:.3f}",
            must=False,
        ),
    ]
    return checks


def _draw(fits: dict[str, Fit], eigenvalues: Tensor) -> Figure:
    figure = new_figure()
    figure.set_size_inches(12, 4.2)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.13, top=0.92, wspace=0.24)
    error, wrong, energy = figure.subplots(1, 3)
    for name, fit in fits.items():
        colour, scale = COLOURS[name], float(fit.labels.norm())
        k = np.arange(len(fit.track.residuals)) + 1
        error.plot(
            k,
            np.array(fit.track.residuals) / scale,
            color=colour,
            linewidth=3,
            alpha=0.45,
            label=f"{name} labels, measured",
        )
        error.plot(
            k,
            fit.predicted.numpy() / scale,
            color=colour,
            linestyle="--",
            linewidth=1.3,
            label=f"{name} labels, predicted",
        )
        wrong.plot(k, np.array(fit.track.wrong) / len(fit.labels), color=colour, label=f"{name} labels")
        energy.plot(
            np.arange(1, len(fit.shares) + 1), fit.shares.cumsum(0).numpy(), color=colour, label=f"{name} labels"
        )
    energy.plot(
        np.arange(1, len(eigenvalues) + 1),
        (eigenvalues.cumsum(0) / eigenvalues.sum()).numpy(),
        ":k",
        label="eigenvalues",
    )
    for axes in (error, wrong):
        axes.set_xscale("log")
        axes.set_ylim(0, None)
    error.legend(frameon=False, fontsize=8, loc="lower left")
    for axes in (wrong, energy):
        axes.legend(frameon=False, fontsize=9)
    dress(error, "the error, measured and predicted", "step k + 1", "|u(k) - y| / |y|")
    dress(wrong, "training error", "step k + 1", "share of wrong signs")
    dress(energy, "labels on the eigenvectors of H_inf", "eigenvector, by eigenvalue", "cumulative share of |y|^2")
    energy.set_xscale("log")
    energy.set_ylim(0, 1.05)
    return figure
