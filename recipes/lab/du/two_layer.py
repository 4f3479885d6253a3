"""Du, Zhai, Poczos, Singh 2019 on real data: the limit of the kernel of two layers, and the rate along a whole run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_conv.kernels.infinite import h_infinity
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.du.two_layer_figure import draw
from lightning_conv.recipes.lab.du.two_layer_run import Track, train
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.progress import equal_parts, progress_bar
from lightning_conv.theory import DuTwoLayer
from lightning_conv.theory.papers.du import contraction_criterion, last_hidden_gram, neuron_radius, predicted_residuals

SOURCE = "Du, Zhai, Poczos, Singh 2019 (1810.02054)"
MEASURED = 100
"""Number of measurements of the kernel along a run."""


SMALL: dict[str, Any] = {"n": 10, "widths": (128, 512, 2048), "draws": 8, "steps": 40}
"""Settings with which `run` takes seconds."""


def run(
    *,
    n: int = 50,
    widths: tuple[int, ...] = (64, 256, 1024, 4096, 16384, 65536),
    draws: int = 10,
    steps: int = 3000,
    eta: float | None = None,
    classes: tuple[int, int] = (3, 8),
    source: Source = "digits",
    root: str = "data",
    seed: int = 0,
) -> Report:
    """Train the two-layer ReLU network by full-batch gradient descent on S = 1/2 sum (u - y)^2, at several widths.

    Cost: about 100 s on 2 cores with the default settings.

    Args:
        n: samples of two classes, scaled to norm 1.
        widths: two or more values of m, ascending.
        draws: number of random draws of the initial kernel at each width.
        steps: steps of gradient descent.
        eta: step size on S; None: 1 / lambda_max(H_inf).
        classes: the two classes of the images.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.
        seed: seed of the data's order and the weights.

    Returns:
        The checks of the limit, the kernel and the rate, and a table with one row per width.

    Raises:
        ValueError: there are fewer than two widths or draws, the widths do not ascend, or there is no step.
    """
    if len(widths) < 2 or list(widths) != sorted(set(widths)):
        raise ValueError(f"widths: {list(widths)}; need two or more, ascending")
    if draws < 2 or steps < 1:
        raise ValueError(f"draws, steps: {draws}, {steps}; need at least 2 draws and 1 step")
    data = two_classes(n, classes=classes, source=source, root=root, seed=seed)
    limit = h_infinity(data.inputs)
    spectrum = kernel_spectrum(limit)
    lambda_0, lambda_max = spectrum.lambda_min, spectrum.lambda_max.value
    eta = 1 / lambda_max if eta is None else eta

    gaps = {m: _gaps(data.inputs, limit, m, draws, seed) for m in widths}
    slope, slope_error = fit_slope(gaps)
    tracks = []
    # The duration (2e-10 s per operation) only decides whether a bar is shown.
    with progress_bar("gradient descent at each width", steps * sum(widths) * n * n * 2e-10, None) as bar:
        parts = equal_parts(bar, len(widths))
        for m, part in zip(widths, parts, strict=True):
            network = DuTwoLayer(data.inputs.shape[1], m, seed=seed)
            every = max(1, steps // MEASURED)
            tracks.append(train(network, data.inputs, data.targets, eta=eta, steps=steps, every=every, report=part))

    rows = [_row(track, gaps[track.width], eta, lambda_0, n) for track in tracks]
    predicted = predicted_residuals(limit, tracks[-1].outputs - data.targets, eta, range(len(tracks[-1].residuals)))
    return Report(
        name="du_two_layer",
        title="Two layers: the kernel tends to its limit, and the error shrinks at the theorem's rate",
        setting=_setting(n, classes, source, eta, lambda_0, lambda_max, steps, draws),
        checks=_checks(rows, tracks[-1], slope, slope_error, lambda_0, eta, predicted),
        tables={"Each width": rows},
        figure=draw(gaps, slope, tracks, lambda_0.value, eta, predicted),
        data={
            "lambda_0": [lambda_0.lower, lambda_0.value, lambda_0.upper],
            "lambda_max": lambda_max,
            "eta": eta,
            "slope": [slope, slope_error],
            "gaps": {str(m): values for m, values in gaps.items()},
            "largest width": {
                "residuals": tracks[-1].residuals,
                "predicted": predicted,
                "at": tracks[-1].at,
                "lambda_min": tracks[-1].lambda_min,
                "drift": tracks[-1].drift,
            },
        },
    )


def _gaps(x: Tensor, limit: Tensor, width: int, draws: int, seed: int) -> list[float]:
    """Return |H(0) - H_inf|_2 of several random networks."""
    return [
        float(
            torch.linalg.eigvalsh(last_hidden_gram(DuTwoLayer(x.shape[1], width, seed=seed + k), x) - limit).abs().max()
        )
        for k in range(draws)
    ]


def fit_slope(gaps: dict[int, list[float]]) -> tuple[float, float]:
    """Fit gap ~ m^slope by least squares of the logarithms over all draws, and return slope and standard error."""
    points = [(math.log(m), math.log(gap)) for m, values in gaps.items() for gap in values]
    x, y = torch.tensor(points, dtype=torch.float64).T
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    return slope, math.sqrt(float(rest @ rest) / (len(points) - 2) / float(x @ x))


def _row(track: Track, gaps: Sequence[float], eta: float, lambda_0: Bounded, n: int) -> dict[str, float | bool | int]:
    contraction = contraction_criterion([r * r for r in track.residuals], eta, lambda_0)
    return {
        "m": track.width,
        "|H(0)-H_inf|_2 / lambda_0": sum(gaps) / len(gaps) / lambda_0.value,
        "lowest lambda_min(H(k)) / lambda_0": min(track.lambda_min) / lambda_0.value,
        "largest drift / lambda_0": max(track.drift) / lambda_0.value,
        "under the bound at every step": contraction.verdict == "consistent",
        "|r| at the end": track.residuals[-1],
        "patterns changed": track.patterns,
        "max_r |w_r - w_r(0)|": track.movement,
        "R'": neuron_radius(track.residuals[0], n, track.width, lambda_0.value),
    }


def _checks(
    rows: list[dict[str, float | bool | int]],
    widest: Track,
    slope: float,
    slope_error: float,
    lambda_0: Bounded,
    eta: float,
    predicted: Tensor,
) -> list[Check]:
    last, m = rows[-1], widest.width
    share = min(widest.lambda_min) / lambda_0.upper
    contraction = contraction_criterion([r * r for r in widest.residuals], eta, lambda_0)
    movement, radius = widest.movement, float(last["R'"])
    off = float((torch.tensor(widest.residuals, dtype=torch.float64) - predicted).abs().max()) / widest.residuals[0]
    shrinking = [float(row["max_r |w_r - w_r(0)|"]) for row in rows]
    quarter = float(last["|H(0)-H_inf|_2 / lambda_0"])
    drift = max(widest.drift) / lambda_0.value
    patterns = [float(row["patterns changed"]) for row in rows]
    return [
        Check(
            "|H(0) - H_inf|_2 falls like m^(-1/2): fitted exponent within 0.1 of -1/2",
            f"{SOURCE}, Lemma 3.1",
            abs(slope + 0.5) <= 0.1,
            f"{slope:.3f} +- {slope_error:.3f}",
        ),
        Check(
            f"lambda_min(H(k)) >= lambda_0 / 2 along training, m = {m:,}",
            f"{SOURCE}, Lemma 3.2",
            share >= 0.5,
            f"lowest ratio {share:.3f}, measured at {len(widest.at)} steps; lambda_0 = {lambda_0.value:.4g}",
        ),
        Check(
            f"|u(k) - y|^2 <= (1 - eta lambda_0 / 2)^k |u(0) - y|^2 at every step, m = {m:,}",
            f"{SOURCE}, Theorem 4.1",
            contraction.verdict == "consistent",
            f"{len(widest.residuals) - 1:,} steps; nearest: exp({contraction.measured:.3g}) of the bound",
        ),
        Check(
            f"max_r |w_r(k) - w_r(0)| <= R', m = {m:,}",
            f"{SOURCE}, Corollary 4.1",
            movement <= radius,
            f"{movement:.4g} <= {radius:.4g}",
        ),
        Check(
            f"|H(0) - H_inf|_2 <= lambda_0 / 4, m = {m:,}",
            f"{SOURCE}, Lemma 3.1 (for m of an unspecified size)",
            quarter <= 0.25,
            f"mean ratio {quarter:.3f}",
            must=False,
        ),
        Check(
            f"|H(k) - H(0)|_2 <= lambda_0 / 4 along training, m = {m:,}",
            f"{SOURCE}, Lemma 3.2 (for m of an unspecified size)",
            drift <= 0.25,
            f"largest ratio {drift:.3f}",
            must=False,
        ),
        Check(
            "pattern changes and the largest movement of a neuron fall with the width",
            f"{SOURCE}, section 5, Figure 1",
            all(b < a for a, b in pairwise(shrinking)) and patterns[-1] < patterns[0],
            f"movement {shrinking[0]:.3g} to {shrinking[-1]:.3g}, patterns {patterns[0]:.3g} to {patterns[-1]:.3g}",
            must=False,
        ),
        Check(
            f"|u(k) - y| follows the linear model of H_inf within 0.02 |u(0) - y|, m = {m:,}",
            "Arora, Du, Hu, Li, Wang 2019 (1901.08584), Theorem 4.1",
            off <= 0.02,
            f"largest distance {off:.4f} |u(0) - y|",
            must=False,
        ),
    ]


def _setting(
    n: int,
    classes: tuple[int, int],
    source: str,
    eta: float,
    lambda_0: Bounded,
    lambda_max: float,
    steps: int,
    draws: int,
) -> str:
    return (
        f"u = (1/sqrt m) sum_r a_r relu(w_r . x), a_r = -1 or 1 and not trained, w_r ~ N(0, I); {n} samples of {source}, classes "
        f"{classes[0]} (y = -1) and {classes[1]} (y = 1), scaled to norm 1; gradient descent on S = 1/2 sum (u - y)^2 in float64, "
        f"{steps:,} steps of eta = {eta:.4g}. H_inf has lambda_0 = {lambda_0.value:.6g} (proven within "
        f"{lambda_0.upper - lambda_0.value:.1g}) and lambda_max = {lambda_max:.4g}. The kernel at the start is from {draws} draws per "
        "width, training from one. The theorem's own widths (n^6 / lambda_0^4 and constants) and step sizes (lambda_0 / n^2) are far "
        "away: what is checked is its mechanism."
    )
