"""Allen-Zhu, Li & Song 2019: their network on real data at several widths, trained by plain gradient descent on F."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from torch import Tensor

from lightning_conv import largest_eigenvalue, ntk_gram
from lightning_conv.recipes.lab.allen_zhu.figure import draw
from lightning_conv.recipes.lab.allen_zhu.findings import (
    Fit,
    Probe,
    Run,
    checks_of,
    data_row,
    fit_row,
    laws,
    plain,
    row_of,
)
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.report import Report
from lightning_conv.reporting.progress import progress_bar
from lightning_conv.theory.networks import AllenZhuNet
from lightning_conv.theory.papers.allen_zhu import (
    Residual,
    fit_semi_smoothness,
    forward_drift,
    gradient_ratios,
    hidden_norms,
    residual,
    separation,
    unit_inputs,
    worst_size,
)
from lightning_conv.theory.tools.activations import activation_patterns
from lightning_conv.theory.tools.matrix_norms import distances
from lightning_conv.theory.tools.power_law import PowerLaw, power_law

LENGTHS = (0.25, 1.0, 4.0)
"""Lengths of the trial step, in gradient-descent steps, at which the residual is measured; one alone would not separate a from b."""


SMALL: dict[str, Any] = {"n": 8, "depth": 2, "widths": (16, 64), "seeds": 2, "max_steps": 60, "probes": 6}
"""Settings with which `run` takes seconds."""


def run(
    n: int = 40,
    depth: int = 3,
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048),
    seeds: int = 3,
    stop_at: float = 0.01,
    max_steps: int = 4000,
    probes: int = 24,
    source: Source = "digits",
    root: str = "data",
) -> Report:
    """Train at each width until F <= ``stop_at`` F(0), with step size eta = 1 / lambda_max of the initial NTK Gram matrix.

    Cost: about 370 s on 2 cores with the default settings.

    Args:
        n: samples, half of them of each of two classes.
        depth: number L of trained hidden layers.
        widths: numbers m of units per hidden layer.
        seeds: initialisations per width.
        stop_at: value of F / F(0) at which training ends, the same for all widths, so that distances can be compared.
        max_steps: largest number of steps.
        probes: steps at which a run is measured, evenly spaced in the logarithm up to ``max_steps``; a run that ends before has fewer.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.

    Returns:
        The checks of the proof's inequalities in its order, and tables of the data, the trained networks by width, the
        fitted exponents and the fitted semi-smoothness bounds.

    Raises:
        ValueError: fewer than two widths, a setting that is not positive, or ``stop_at`` outside (0, 1).
    """
    if len(widths) < 2:
        raise ValueError(f"widths: {widths}; need two widths or more")
    if not 0 < stop_at < 1:
        raise ValueError(f"stop_at: {stop_at}; need a share of the loss at the start, between 0 and 1")
    sizes = {"n": n, "depth": depth, "seeds": seeds, "max_steps": max_steps, "probes": probes}
    if wrong := [f"{name}: {size}; need 1 or more" for name, size in sizes.items() if size < 1]:
        raise ValueError(wrong[0])
    data = two_classes(n, source=source, root=root)
    apart = separation(data.inputs, data.labels, below=(0.1, 0.2, 0.3))
    x, y = unit_inputs(data.inputs), data.targets[:, None]
    runs: list[Run] = []
    cost = [width**2 for width in widths for _ in range(seeds)]
    # 60 s: a rough duration; it only decides whether a bar is shown (``progress.LONG``).
    with progress_bar("training", 60.0, None) as report:
        for done, (width, seed) in enumerate(product(widths, range(seeds))):
            net = AllenZhuNet(x.shape[1], width, depth, 1, seed=seed)
            runs.append(_train(net, x, y, seed, stop_at, max_steps, probes))
            report(sum(cost[: done + 1]) / sum(cost))
    fits = {width: _fit([r.steps for r in runs if r.width == width]) for width in widths}
    joint = _joint(runs)
    found = laws(runs)
    worst = _worst(x[:8])
    setting = (
        f"{n} images of {source} (3 against 8) as unit vectors with last coordinate 1/sqrt2, targets -1 and 1; h_0 = relu(A x), h_l = "
        f"relu(W_l h_(l-1)), u = B h_L with L = {depth}, A and B fixed; F = (1/2) sum (u - y)^2; plain gradient descent, all samples, eta "
        f"= 1 / lambda_max(G(0)), until F <= {stop_at:g} F(0) or {max_steps} steps; {seeds} initialisations per width; float64. The "
        "theorems hold for widths of the order of n^24 with unspecified constants, so none of them applies here; the question is whether "
        "the quantities in their proofs behave at practical widths as the proofs have them."
    )
    return Report(
        name="allen_zhu",
        title="Allen-Zhu, Li & Song 2019: little movement, few switched units, an almost smooth loss",
        setting=setting,
        checks=checks_of(apart, runs, joint, found, worst, depth),
        tables={
            "Data": [data_row(apart)],
            "After training, means over the initialisations": [
                row_of(runs, width, n, depth, apart) for width in widths
            ],
            "Exponents": [
                {"quantity": name, "measured": law.exponent, "standard error": law.error, "theory": says}
                for name, (law, says) in {
                    **found,
                    "switched units of the worst step, against omega": (worst[2], "2/3"),
                }.items()
            ],
            "Semi-smoothness: fitted to every other probe of the first initialisation, judged on the rest": [
                fit_row("all, jointly", 1, joint),
                *(fit_row(width, width, fit) for width, fit in fits.items()),
            ],
        },
        figure=draw(runs, fits, worst, found),
        data={"runs": [plain(r) for r in runs]},
    )


def _train(net: AllenZhuNet, x: Tensor, y: Tensor, seed: int, stop_at: float, max_steps: int, probes: int) -> Run:
    """Train one network until F <= ``stop_at`` F(0), and measure it at about ``probes`` steps on the way."""
    eta = 1 / largest_eigenvalue(ntk_gram(net, x).matrix).value
    start = {f"hidden.{k}.weight": weight.clone() for k, weight in enumerate(net.weights)}
    patterns, states = activation_patterns(net, x), net.states(x)
    norms = hidden_norms(states)
    run = Run(len(states[0][0]), seed, eta, (norms.smallest, norms.largest))
    times = set(_log_spaced(max_steps, probes))
    first = float("nan")
    for step in range(max_steps + 1):
        here = net.objective(x, y)
        first = here.loss if step == 0 else first
        done = here.loss <= stop_at * first or step == max_steps
        if step in times or done:
            moved = distances(dict(net.named_parameters()), start)
            changed = activation_patterns(net, x).changed_fraction(patterns)[1:]  # the first layer is fixed
            probe = Probe(
                step=step,
                ratios=gradient_ratios(here),
                omega=max(d.spectral.value for d in moved),
                relative_spectral=max(d.relative_spectral for d in moved),
                relative_frobenius=max(d.relative_frobenius for d in moved),
                changed=float(changed.mean()),
                changed_layer=float(changed.max()),
                drift=forward_drift(net.states(x), states),
            )
            run.probes.append(probe)
            if here.loss > 0:
                steps = ({name: -length * eta * g for name, g in here.gradient.items()} for length in LENGTHS)
                run.steps += [residual(net, x, y, v, at=here) for v in steps]
        if done:
            break
        net.step(here.gradient, eta)
    return run


def _log_spaced(last: int, count: int) -> Iterator[int]:
    """Yield 0 and ``count`` steps, evenly spaced in the logarithm, up to the last one."""
    yield 0
    for k in range(count):
        yield round(last ** (k / max(count - 1, 1)))


def _fit(steps: Sequence[Sequence[Residual]]) -> Fit:
    """Fit the semi-smoothness bound of one width to every other probe of its first run; the rest is held out."""
    even, odd = _halves(steps[0])
    return Fit(fit_semi_smoothness(even), odd, [s for other in steps[1:] for s in other])


def _joint(runs: Sequence[Run]) -> Fit:
    """Fit one bound rho <= a sqrt(m F) |V| + b m |V|^2 to all widths: the theorem's constants do not depend on m."""
    fitted, held, others = [], [], []
    for run in runs:
        steps = [replace(s, size=s.size * run.width**0.5) for s in run.steps]
        even, odd = _halves(steps)
        if run.seed == 0:
            fitted += even
            held += odd
        else:
            others += steps
    return Fit(fit_semi_smoothness(fitted), held, others)


def _halves(steps: Sequence[Residual]) -> tuple[list[Residual], list[Residual]]:
    """Split the residuals by probe: those of probes 0, 2, 4, ... and those of probes 1, 3, 5, ...."""
    at_once = len(LENGTHS)
    even = [s for k, s in enumerate(steps) if (k // at_once) % 2 == 0]
    return even, [s for k, s in enumerate(steps) if (k // at_once) % 2 == 1]


def _worst(inputs: Tensor) -> tuple[list[float], list[float], PowerLaw]:
    """Compute the size omega of the smallest steps that switch given shares of units at width 4096; fit a power law."""
    net = AllenZhuNet(inputs.shape[1], 4096, 1, 1)
    states = net.states(inputs)[0]
    reached = states @ net.weights[0].T
    pairs = [
        (worst_size(g, float(h.norm()), count), count / len(g))
        for g, h in zip(reached, states, strict=True)
        for count in (20, 40, 80, 160, 320, 640)
    ]
    omega, shares = ([pair[k] for pair in pairs] for k in (0, 1))
    return omega, shares, power_law(omega, shares)
