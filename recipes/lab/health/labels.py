"""`lightning-conv lab health_labels`: how often an audit finds labels that are wrong, and whether something cheaper finds them as well."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

from lightning_conv.health.findings.of_labels import FAR
from lightning_conv.health.labels.suspicious_labels import TOP
from lightning_conv.recipes.lab.health.label_findings import (
    SCORED,
    SOURCE,
    LabelRun,
    checks_of_finding,
    runs_of,
    said_rows,
)
from lightning_conv.recipes.lab.health.label_methods import (
    KEPT,
    METHODS,
    auc,
    precision_of_top,
    score_labels,
)
from lightning_conv.recipes.lab.health.label_sets import WHAT, Flips, SetName, label_set, with_flips
from lightning_conv.recipes.lab.panel import dress, sheet
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.progress import progress_bar

SMALL: dict[str, Any] = {"sets": ["digits"], "seeds": 1, "samples": 100}
"""Settings with which `run` takes seconds."""

SECONDS = 4.0
"""Duration of a run, about."""

FLIPS: tuple[Flips, ...] = ("random", "confusable", "none", "all")

METHODS_MEAN = (
    "*kernel*: leave-one-out margins by the network's kernel, at the *start*, at the last measurement before the network names more of "
    "the given labels than the other samples predict (*kept*, which is what `ConvergenceHealth` shows; measured after 0, 1, 2, 4, ... "
    "epochs), and at the *end*. *inputs*, *features*: the same with a Gaussian kernel of the inputs, or of the last features at that "
    "moment. *loss*: of the sample at that moment. *5-fold confidence*: probability of the given label in a network trained without its "
    "fold. AUC: probability that a wrong label is more suspicious than a right one. Mean over the seeds, with the standard deviation. The "
    "limits of the finding were chosen on the seeds 10 to 14."
)


def run(
    *,
    sets: list[SetName] | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    samples: int = 500,
    share: float = 0.1,
    root: str = "data",
) -> Report:
    """Flip some labels, train on them, and ask each method which they are.

    Cost: about 4 s a run on one core, six minutes with the default settings.

    Args:
        sets: Data sets; None: all. MNIST is left out, and the page says so, if it is not there.
        seeds: Number of seeds.
        first_seed: The first one.
        samples: Samples of a run.
        share: Share of wrong labels.
        root: Folder of MNIST.

    Returns:
        Checks of the finding, and of each method against the kernel; tables of both.

    Raises:
        ValueError: There is no seed, the share is not above 0 and below 1, or there is no such set.
    """
    if seeds < 1:
        raise ValueError(f"seeds: {seeds}; need 1 or more")
    if not 0 < share < 1 or round(share * samples) < 1:
        raise ValueError(f"share: {share}; need a number above 0 and below 1, and one wrong label of {samples} or more")
    names, gone = _there(list(WHAT) if sets is None else sets, root)
    wanted = [(name, flips, first_seed + number) for name in names for flips in FLIPS for number in range(seeds)]
    runs = []
    with progress_bar("the runs of the study", SECONDS * len(wanted), None) as report:
        for number, (name, flips, seed) in enumerate(wanted):
            data = label_set(name, samples, seed=seed, root=root)
            labels, wrong = with_flips(data, flips, share, seed=seed)
            found = score_labels(data, labels, seed=seed, whole=flips in SCORED)
            runs.append(LabelRun(name, flips, seed, data.labels, wrong, found))
            report((number + 1) / len(wanted))
    cells = [(name, flips) for name in names for flips in SCORED]
    return Report(
        name="health_labels",
        title="Labels that are wrong on purpose: which are found, and by what",
        setting=(
            f"{samples} samples of each set, {100 * share:.0f} % of their labels wrong: at random, or as the class whose mean is nearest "
            f"(confusable). Seeds {first_seed} to {first_seed + seeds - 1}, each with its own samples, flips, weights and order. Adam, "
            f"batches of 64, the same settings for all. {'; '.join(f'*{name}*: {WHAT[name]}' for name in names)}. {gone}\n\n{METHODS_MEAN}"
        ),
        checks=[*checks_of_finding(runs), *(_check_of(runs, *cell) for cell in cells)],
        tables={
            "AUC": [_row(runs, *cell, score=auc) for cell in cells],
            f"Precision of the top {TOP}": [_row(runs, *cell, score=precision_of_top) for cell in cells],
            f"What the finding says (limit {FAR})": [
                row for name in names for flips in FLIPS for row in said_rows(runs, name, flips)
            ],
        },
        figure=_draw(runs, cells),
        data={
            "runs": [
                {
                    "set": each.name,
                    "flips": each.flips,
                    "seed": each.seed,
                    "kept": each.found.kept,
                    "fitted": each.found.fitted,
                    "auc": {name: auc(s, each.wrong) for name, s in each.found.scores.items()}
                    if each.flips in SCORED
                    else {},
                }
                for each in runs
            ]
        },
    )


def _there(names: Sequence[SetName], root: str) -> tuple[list[SetName], str]:
    """Return the sets that are there, and a sentence about MNIST if it is not."""
    try:
        for name in names:
            label_set(name, 20, seed=0, root=root)
    except FileNotFoundError:
        return [name for name in names if name != "mnist"], f"MNIST is left out: it is not in {root}."
    return list(names), ""


def _values(runs: Sequence[LabelRun], name: SetName, flips: Flips, method: str, score: Any) -> list[float]:
    return [score(each.found.scores[method], each.wrong) for each in runs_of(runs, name, flips)]


def _row(runs: Sequence[LabelRun], name: SetName, flips: Flips, *, score: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"set": name, "flips": flips}
    for method in METHODS:
        values = _values(runs, name, flips, method, score)
        row[method] = f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
    return row


def _check_of(runs: Sequence[LabelRun], name: SetName, flips: Flips) -> Check:
    """Say which methods are better than the kernel that is kept."""
    means = {method: mean(_values(runs, name, flips, method, auc)) for method in METHODS}
    better = [f"{method} {value:.3f}" for method, value in means.items() if value > means[KEPT] and method != KEPT]
    seen = f"{means[KEPT]:.3f}; better: {', '.join(better) or 'none'}"
    return Check(
        f"{name}, {flips} flips: no method has a larger AUC than the kernel kept", SOURCE, not better, seen, must=False
    )


def _draw(runs: Sequence[LabelRun], cells: Sequence[tuple[SetName, Flips]]) -> Figure:
    figure, axes = sheet(9.0, 3.6, 1, 1)
    for number, method in enumerate(METHODS):
        values = [_values(runs, *cell, method, auc) for cell in cells]
        places = torch.arange(len(cells)) + 0.06 * (number - len(METHODS) / 2)
        axes.errorbar(
            places,
            [mean(each) for each in values],
            yerr=[stdev(each) if len(each) > 1 else 0.0 for each in values],
            fmt="o" if method.startswith("kernel") else "x",
            markersize=4,
            label=method,
        )
    axes.set_xticks(range(len(cells)), [f"{name}\n{flips}" for name, flips in cells], fontsize=7)
    dress(axes, "AUC of each method, mean and standard deviation over the seeds", "", "AUC", legend="lower left")
    return figure
