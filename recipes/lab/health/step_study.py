"""`lightning-conv lab health_step`: how often the sentences about the step and about a rise of the loss are right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_conv.recipes.lab.health.edge_figure import OPTIMIZERS, check_edge, edge_figure, edge_run
from lightning_conv.recipes.lab.health.judged_run import JudgedRun, judge_run
from lightning_conv.recipes.lab.health.kept_results import KeptResults
from lightning_conv.recipes.lab.health.step_record import StepRecord, record_run
from lightning_conv.recipes.lab.health.step_tables import (
    advice,
    alarms,
    causes,
    check_alarms,
    check_causes,
    hits,
    risk_by_ratio,
    risk_by_start,
)
from lightning_conv.recipes.lab.health.study_plan import NETWORKS, SHARE, planned_runs
from lightning_conv.recipes.lab.health.study_runs import Network
from lightning_conv.recipes.lab.report import Report

SMALL: dict[str, Any] = {"seeds": 1, "networks": ["mlp"], "edge_steps": 40, "most": 12}
"""Settings with which `run` takes seconds."""

CHOSEN = "0 to 2 and 100 to 109"
"""Seeds on which the thresholds of the findings were chosen."""

SECONDS = 0.5
"""Duration of a run, about."""


def run(
    *,
    seeds: int = 30,
    first_seed: int = 110,
    networks: list[Network] | None = None,
    edge_steps: int = 1500,
    most: int | None = None,
    keep: str | None = None,
) -> Report:
    """Train the runs of the study, say of each what ``ConvergenceHealth`` says, and compare with how it ended.

    Cost: about 40 minutes on one core with the default settings.

    Args:
        seeds: Number of seeds of the perceptrons; the other networks have a sixth of them.
        first_seed: The first one; the thresholds were chosen on ``CHOSEN``.
        networks: Names of networks; None: all.
        edge_steps: Steps of the runs of the figure.
        most: Largest number of runs of a network; None: all.
        keep: File in which every run is kept, one a line. What it holds already is not trained again; delete it when the code has
            changed. None: nothing is kept.

    Raises:
        ValueError: There is no seed, or a network has no such name.
    """
    if seeds < 1:
        raise ValueError(f"seeds: {seeds}; need 1 or more")
    wanted = NETWORKS if networks is None else tuple(networks)
    if unknown := set(wanted) - set(NETWORKS):
        raise ValueError(f"networks: {', '.join(sorted(unknown))}; choose from {', '.join(NETWORKS)}")
    kept = KeptResults(None if keep is None else Path(keep))
    judged = [each for network in wanted for each in _judged(network, seeds, first_seed, most, kept)]
    alone = [each for each in judged if each.run.cause == "none"]
    advised = _advised(alone, kept)
    rates, check_rates = advice(advised)
    edges = [edge_run(name, seed=first_seed, steps=edge_steps) for name in OPTIMIZERS]
    few = max(1, seeds // SHARE)
    return Report(
        name="health_step",
        title="The step and the loss: how often what is said of them is right",
        setting=(
            f"Perceptrons (two layers of 64 units, 128 digits, 120 steps, seeds {first_seed} to {first_seed + seeds - 1}), a CNN with "
            f"BatchNorm, a ResNet-8 and a small GPT (60 to 100 steps, seeds {first_seed} to {first_seed + few - 1}), with squared loss "
            "and cross-entropy, SGD, momentum 0.9 and AdamW, full batches and mini-batches (the ResNet: mini-batches, the GPT: "
            "cross-entropy). The rate follows from the stability ratio at the start; AdamW's is read after ten steps at 0.001. Runs in "
            "plain torch, measured every ten steps; the sentences are those of the product's own functions, in the order in which "
            f"`ConvergenceHealth` calls them. The thresholds were chosen on the seeds {CHOSEN} and fixed before these "
            "seeds were run. Ended badly: not finite, worse than its start, or a training loss of 20 times its start at some time. "
            "False alarms count in runs that are finite and end below their start, whatever happened before. In brackets: Wilson "
            f"intervals at 95 %, and the numbers. {len(judged)} runs, and {len(advised)} with an advised rate."
            + kept.words
        ),
        checks=[*check_causes(judged), *check_alarms(alone), *check_rates, *(check_edge(each) for each in edges)],
        tables=_tables(judged, alone, rates),
        figure=edge_figure(edges),
    )


def _judged(network: Network, seeds: int, first: int, most: int | None, kept: KeptResults) -> list[JudgedRun]:
    number = seeds if network == "mlp" else max(1, seeds // SHARE)
    todo = planned_runs(network, range(first, first + number))[:most]
    title = f"runs of the {network}"
    records = kept.results(
        todo, record_run, write=StepRecord.to_json, read=StepRecord.from_json, title=title, seconds=SECONDS
    )
    return [judge_run(run, record) for run, record in zip(todo, records, strict=True)]


def _advised(alone: Sequence[JudgedRun], kept: KeptResults) -> list[tuple[JudgedRun, JudgedRun]]:
    """Train the runs in which a rate was advised from the same start with that rate."""
    print("runs with an advised rate", file=sys.stderr)
    found = []
    for each in alone:
        if (rate := each.advised) is None:
            continue
        key = f"advised/{rate:.6g}/{each.run.key}"
        if key not in kept.known:
            kept.keep(key, record_run(each.run, rate=rate, measured=False).to_json())
        found.append((each, judge_run(each.run, StepRecord.from_json(kept.known[key]))))
    return found


def _tables(judged: Sequence[JudgedRun], alone: Sequence[JudgedRun], rates: list[dict[str, Any]]) -> dict[str, Any]:
    mlps, others = ([each for each in alone if (each.run.network == "mlp") == first] for first in (True, False))
    tables = {
        "Ended badly, by the ratio at the start: perceptrons": risk_by_start(mlps),
        "Ended badly, by the ratio after 10 steps: perceptrons": risk_by_ratio(mlps, 10),
        "Ended badly, by the ratio at the start: CNN, ResNet-8 and GPT": risk_by_start(others),
        "Ended badly, by the ratio after 10 steps: CNN, ResNet-8 and GPT": risk_by_ratio(others, 10),
        "The cause of a rise: runs by what was done to them": causes(judged),
        "False alarms: share of the runs that end well": alarms(alone),
        "Bad ends that were found": hits(alone),
        "Runs with the advised rate, from the same start": rates,
    }
    return {caption: rows for caption, rows in tables.items() if rows}
