"""Deep networks of Du, Lee, Li, Wang, Zhai 2019 in training, with every link of the proof measured on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.recipes.lab.data import Source, two_classes
from lightning_conv.recipes.lab.du.architectures import SOFTPLUS, SOURCE, limit_kernel, network
from lightning_conv.recipes.lab.du.training_figure import draw
from lightning_conv.recipes.lab.du.training_run import DeepRun, movement_verdict, train
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.progress import part, progress_bar
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.tools.power_law import power_law

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "softplus": SOFTPLUS}
THEOREMS = {"DuFC": "Theorem 5.1", "DuResNet": "Theorem 6.1"}


SMALL: dict[str, Any] = {"n": 6, "widths": (32, 128), "seeds": 2, "steps": 40, "probes": 6}
"""Settings with which `run` takes seconds."""


def run(
    *,
    n: int = 20,
    depth: int = 3,
    widths: tuple[int, ...] = (64, 256, 1024),
    seeds: int = 3,
    steps: int = 1000,
    probes: int = 24,
    rate: float = 1.0,
    c_res: float = 0.5,
    activation: Literal["tanh", "softplus"] = "tanh",
    source: Source = "digits",
    root: str = "data",
) -> Report:
    """Train DuFC and DuResNet at several widths and compare every link of the proof with the runs.

    Cost: about 140 s on 2 cores with the default settings.

    Args:
        n: samples of two classes, scaled to norm 1.
        depth: number H of hidden layers, 2 or more.
        widths: values of m, ascending.
        seeds: initialisations per width.
        steps: steps of gradient descent.
        probes: number of steps at which the kernels are measured, evenly spaced on a logarithmic axis.
        rate: step size in units of 1 / lambda_max(G(0)); the linearised model diverges from 2 on.
        c_res: factor c_res of the residual branches.
        activation: smooth, as the theorems ask.
        source: source of the images: digits, or mnist, which must be on disk.
        root: folder of MNIST.

    Returns:
        The checks of both architectures, and a table with one row per run.

    Raises:
        ValueError: there are fewer than two widths, they do not ascend, or another setting is out of range.
    """
    if len(widths) < 2 or list(widths) != sorted(set(widths)):
        raise ValueError(f"widths: {list(widths)}; need two or more, ascending")
    if steps < 2 or probes < 3 or depth < 2 or seeds < 1 or not 0 < rate < 2:
        raise ValueError(
            f"steps, probes, depth, rate, seeds: {steps}, {probes}, {depth}, {rate}, {seeds}; need 2, 3, 2 or more, a rate below 2, "
            "and 1 seed or more"
        )
    data, sigma = two_classes(n, source=source, root=root), ACTIVATIONS[activation]
    x, y = data.inputs, data.targets
    limits = {f"Du{name}": limit_kernel(name, x, depth, sigma, c_res) for name in ("FC", "ResNet")}
    runs: list[DeepRun] = []
    costs = [float(m * m) for _ in limits for m in widths for _ in range(seeds)]
    # The duration (4e-9 s per unit of cost) only decides whether a bar is shown.
    with progress_bar("gradient descent", steps * sum(costs) * depth * 4e-9, None) as bar:
        for name, limit in limits.items():
            for m, seed in product(widths, range(seeds)):
                drawn = network(name.removeprefix("Du"), x.shape[1], m, depth, sigma, c_res, seed)
                before, share = sum(costs[: len(runs)]) / sum(costs), costs[len(runs)] / sum(costs)
                report = part(bar, before, share)
                runs.append(train(drawn, x, y, limit, seed=seed, steps=steps, probes=probes, rate=rate, report=report))
    return Report(
        name="du_train",
        title="Deep networks along training: each link of the proof, measured",
        setting=_setting(n, depth, seeds, steps, probes, rate, c_res, activation, source, limits),
        checks=_checks(runs),
        tables={"Each run": [_row(each) for each in runs]},
        figure=draw(runs),
        data={"runs": [_plain(each) for each in runs]},
    )


def _checks(runs: Sequence[DeepRun]) -> list[Check]:
    """Check the proven inequalities, the theorem's conclusions at the largest width, and the trends that its O(.) leave open."""
    probes = [(run, probe) for run in runs for probe in run.probes]
    chain = [
        probe.lambda_min.verdict == "consistent"
        for run, probe in probes
        if run.start.verdict == "consistent" and probe.drift.verdict == "consistent"
    ]
    premises = [
        probe for _, probe in probes if all(each.verdict == "consistent" for each in (probe.lambda_min, *probe.small))
    ]
    checks = [
        Check("|G^(H)(0) - K^(H)|_2 <= lambda_0 / 4 and |G^(H)(k) - G^(H)(0)|_2 <= lambda_0 / 4 give lambda_min(G^(H)(k)) >= lambda_0 / 2",
              f"{SOURCE}, Lemmas B.2, B.4", all(chain), f"both hold at {len(chain)} of {len(probes)} probes of all runs"),
        Check("lambda_min(G^(H)(k)) >= lambda_0 / 2 with the bounds of B.6 and B.7 gives |r(k+1)|^2 <= (1 - eta lambda_0 / 2) |r(k)|^2",
              f"{SOURCE}, Lemmas B.6, B.7", all(probe.contracts.verdict == "consistent" for probe in premises),
              f"all three hold at {len(premises)} of {len(probes)} probes of all runs"),
        Check("lambda_min of all layers' G(k) is at least that of G^(H)(k)", f"{SOURCE}, section 4",
              all(probe.whole.upper >= probe.last.lower for _, probe in probes),
              f"smallest ratio {min(probe.whole.value / probe.last.value for _, probe in probes):.3g} over all probes"),
    ]  # fmt: skip
    for name, theorem in THEOREMS.items():
        mine = [run for run in runs if run.name == name]
        checks += _network_checks(name, theorem, mine)
    return checks


def _network_checks(name: str, theorem: str, mine: Sequence[DeepRun]) -> list[Check]:
    """Check the conclusions of the theorem for one architecture."""
    widths = sorted({run.width for run in mine})
    widest = [run for run in mine if run.width == widths[-1]]
    at = f"m = {widths[-1]}, every initialisation"

    def falls(what: str, source: str, value: Callable[[DeepRun], float], *, must: bool) -> Check:
        law = power_law([run.width for run in mine], [value(run) for run in mine])
        means = {m: [value(run) for run in mine if run.width == m] for m in widths}
        said = ", ".join(f"{m}: {sum(values) / len(values):.3g}" for m, values in means.items())
        error = "" if math.isnan(law.error) else f" +- {law.error:.2f}"
        claim = f"{name}: {what} falls with the width, theory -1/2"
        return Check(
            claim, f"{SOURCE}, {source}", law.exponent < 0, f"exponent {law.exponent:.2f}{error}; means {said}", must
        )

    def worst(criteria: Sequence[Criterion]) -> Check:
        held = [each.verdict == "consistent" for each in criteria]
        told = max(criteria, key=lambda each: each.measured)
        return Check(f"{name}: {told.asks}, {at}", told.source, all(held), told.reason, must=False)

    nearest = max(run.contraction.measured for run in widest)
    lowest = {m: min(run.share for run in mine if run.width == m) for m in widths}
    movements = [verdict for run in widest if (verdict := movement_verdict(run)) is not None]
    checks = [
        Check(f"{name}: |r(k)|^2 <= (1 - eta lambda_0 / 2)^k |r(0)|^2 at every step, {at}", f"{SOURCE}, {theorem}",
              all(run.contraction.verdict == "consistent" for run in widest),
              f"{len(widest[0].losses) - 1} steps; nearest: exp({nearest:.3g}) of the bound"),
        Check(f"{name}: lambda_min(G^(H)(k)) >= lambda_0 / 2 at every probe, {at}", f"{SOURCE}, Lemma B.4", lowest[widths[-1]] >= 0.5,
              "lowest ratio by width " + ", ".join(f"{m}: {share:.3f}" for m, share in lowest.items())),
        falls("the averaged movement max_h |W^(h) - W^(h)(0)|_F / sqrt(m) at the end, over |r(0)|,", "eq. (6)", lambda run: run.moved,
              must=True),
        falls("the drift |G^(H)(k) - G^(H)(0)|_2 / lambda_0", "Lemma B.4", lambda run: run.largest_drift, must=False),
        falls("the relative linearisation error", "Lemma B.6", lambda run: run.remainder, must=False),
        worst([run.norms for run in widest]),
        worst([run.start for run in widest]),
        *([worst(movements)] if movements else []),
    ]  # fmt: skip
    for k in (0, 1):
        verdicts = [(probe.step, probe.small[k].verdict == "consistent") for run in widest for probe in run.probes]
        held = sorted(step for step, holds in verdicts if holds)
        asks, source = widest[0].probes[-1].small[k].asks, widest[0].probes[-1].small[k].source
        first = f", the first at k = {held[0]}" if held else ""
        seen = f"at {len(held)} of {len(verdicts)} probes{first}; the lemma has eta = O(lambda_0 / n^2)"
        checks.append(
            Check(f"{name}: {asks} at every probe, {at}", source, len(held) == len(verdicts), seen, must=False)
        )
    return checks


def _row(run: DeepRun) -> dict[str, object]:
    return {
        "network": run.name, "m": run.width, "seed": run.seed, "eta": run.eta, "lambda_0": run.lambda_0.value,
        "|G(0)-K|_2 / lambda_0": run.start.measured, "lowest lambda_min / lambda_0": run.share,
        "largest drift / lambda_0": run.largest_drift, "averaged movement / |r(0)|": run.moved,
        "R' (B.5)": "-" if math.isnan(run.radius) else run.radius,
        "linearisation error": run.remainder, "loss at the end over the first": run.losses[-1] / run.losses[0],
        "under the bound at every step": run.contraction.verdict == "consistent",
    }  # fmt: skip


def _plain(run: DeepRun) -> dict[str, object]:
    return {
        "network": run.name, "width": run.width, "seed": run.seed, "eta": run.eta, "losses": run.losses,
        "at": [probe.step for probe in run.probes],
        "lambda_min_share": [probe.lambda_min.measured for probe in run.probes],
        "drift_share": [probe.drift.measured for probe in run.probes],
        "movement": [probe.movement for probe in run.probes],
        "linearisation_error": [probe.remainder for probe in run.probes],
        "rate_linearised": [probe.linearised for probe in run.probes],
        "rate_measured": [probe.measured for probe in run.probes],
    }  # fmt: skip


def _setting(
    n: int, depth: int, seeds: int, steps: int, probes: int, rate: float, c_res: float, activation: str, source: str,
    limits: dict[str, LimitKernel],
) -> str:  # fmt: skip
    smallest = ", ".join(f"{name} {limit.lambda_0.value:.4g}" for name, limit in limits.items())
    return (
        f"{n} images of {source} (3 against 8) of norm 1, targets -1 and 1; H = {depth} hidden layers, {activation}, c_res = {c_res}; all "
        "layers and the output trained by gradient descent on S = 1/2 sum (u - y)^2, all samples, float64, "
        f"{steps} steps of eta = {rate:g} / lambda_max(G(0)), G over all layers; {seeds} initialisations per width. The kernels are "
        f"measured at about {probes} steps, the loss at all. G^(H): of the last hidden layer, the part of G that the proof keeps; "
        f"lambda_0 = lambda_min(K^(H)) of its limit: {smallest}. The theorems' widths (n^4 / lambda_0^4, unspecified constants) and steps "
        "(lambda_0 / n^2) are far away: what is checked is the chain of the proof, and whether its conclusions hold at practical widths."
    )
