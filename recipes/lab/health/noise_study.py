"""`lightning-conv lab health_noise`: the simple noise scale of the product against the critical batch size of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from lightning_conv.callbacks.health.noise_of_run import POOLED
from lightning_conv.recipes.lab.health.batch_sweep import (
    MEASURED,
    PROBE,
    RATES,
    SAMPLES,
    NoiseCase,
    NoiseResult,
    Source,
    sweep,
)
from lightning_conv.recipes.lab.health.kept_results import KeptResults, grouped
from lightning_conv.recipes.lab.report import Check, Report

SMALL: dict[str, Any] = {"seeds": 1, "sources": ["digits"], "batches": [8, 32, 128], "most": 400}
"""Settings with which `run` takes seconds."""

TARGETS: dict[Source, tuple[float, ...]] = {"digits": (0.8, 0.2), "mnist": (0.8, 0.4)}
"""Losses to be reached: early and late."""

FEW = 3
"""Sweeps from which on the check has to be satisfied."""

WITHIN = 3.0
"""Factor within which the noise scale is to lie of the critical batch."""


def run(
    *,
    seeds: int = 5,
    first_seed: int = 0,
    sources: list[Source] | None = None,
    batches: list[int] | None = None,
    most: int = 3000,
    root: str = "data",
    keep: str | None = None,
) -> Report:
    """Compare the noise scale with the critical batch size on digits, and on MNIST if it is asked for.

    Cost: one to three minutes for each data set and five seeds on one core.

    Args:
        seeds: Number of seeds.
        first_seed: The first one.
        sources: ``"digits"`` (always there) and ``"mnist"`` (must be on disk); None: digits.
        batches: Batch sizes; None: 2 to 512 by factors of four.
        most: Largest number of steps of a run.
        root: Folder of MNIST.
        keep: File in which every sweep is kept, one a line; None: nothing is kept.

    Raises:
        ValueError: There is no seed, or there are fewer than three batch sizes.
    """
    sizes = tuple(batches or (2, 8, 32, 128, 512))
    if seeds < 1 or len(set(sizes)) < 3:
        raise ValueError(f"seeds, batches: {seeds}, {list(sizes)}; need 1 seed or more, and three batch sizes")
    todo = [
        NoiseCase(source, target, seed, sizes, most, root)
        for source in sources or ["digits"]
        for target in TARGETS[source]
        for seed in range(first_seed, first_seed + seeds)
    ]
    kept = KeptResults(None if keep is None else Path(keep))
    results = kept.results(
        todo, sweep, write=asdict, read=NoiseResult.from_json, title="sweeps of batch sizes", seconds=10.0
    )
    groups = grouped(results, lambda each: (each.source, each.target))
    return Report(
        name="health_noise",
        title="The noise scale against the critical batch size",
        setting=(
            f"A perceptron of 64 and 64 units on {SAMPLES} images, cross-entropy, SGD with batches drawn with replacement, seeds "
            f"{first_seed} to {first_seed + seeds - 1}. For every batch size the rate with the fewest steps to a loss of all {SAMPLES} "
            f"samples is searched among {RATES[0]:g} to {RATES[-1]:g} by factors of two. The critical batch is that of the fitted "
            "hyperbola S = S_min (1 + B_crit / B) of McCandlish et al. 2018. The noise scale is the product's: "
            f"from the gradients of {PROBE} samples in the run with batches of {MEASURED} at its best rate, pooled over "
            f"{POOLED} measurements up to the step at which the loss is reached; and of all measurements of the run together."
            + kept.words
        ),
        checks=[_check(names, some) for names, some in groups.items()],
        tables={
            "By data set and loss, medians (smallest to largest) over the seeds": [
                _row(names, some) for names, some in groups.items()
            ],
            "Steps to the loss by batch size, medians": [
                {"data": source, "loss": target}
                | {f"B = {size}": _middle([each.steps.get(size) for each in some]) for size in sizes}
                for (source, target), some in groups.items()
            ],
        },
        data={"sweeps": [asdict(each) for each in results]},
    )


def _check(names: tuple[str, float], results: Sequence[NoiseResult]) -> Check:
    found = [each.over_critical(each.of_run) for each in results]
    known = [each for each in found if math.isfinite(each)]
    middle = median(known) if known else math.nan
    return Check(
        f"{names[0]}, loss {names[1]:g}: the noise scale of the run is within a factor of {WITHIN:g} of the critical batch (median)",
        "McCandlish et al. 2018, section 3",
        1 / WITHIN <= middle <= WITHIN,
        f"ratio {_spread(found)}",
        must=len(known) >= FEW,
    )


def _row(names: tuple[str, float], results: Sequence[NoiseResult]) -> dict[str, Any]:
    fits = [each.fit for each in results]
    return {
        "data": names[0],
        "loss": names[1],
        "critical batch": _spread([math.nan if each is None else each.critical_batch for each in fits]),
        "error of the fit (log)": _spread([math.nan if each is None else each.error for each in fits]),
        "noise scale at the end": _spread([math.nan if each.scale is None else each.scale for each in results]),
        "over critical": _spread([each.over_critical(each.scale) for each in results]),
        "noise scale of the run": _spread([math.nan if each.of_run is None else each.of_run for each in results]),
        "of the run over critical": _spread([each.over_critical(each.of_run) for each in results]),
    }


def _spread(values: Sequence[float]) -> str:
    known = [each for each in values if math.isfinite(each)]
    if not known:
        return "not known"
    said = f"{median(known):.3g} ({min(known):.3g} to {max(known):.3g})"
    return said if len(known) == len(values) else f"{said}, {len(values) - len(known)} not known"


def _middle(values: Sequence[int | None]) -> str:
    known = [each for each in values if each is not None]
    return f"{median(known):g}" if known else "not reached"
