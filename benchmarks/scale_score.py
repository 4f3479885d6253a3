"""What the measured sweeps say of the model of docs/scale.md: its constants, its errors, the predictions, and their page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scale_cases import CASES, Case
from scale_models import predictions

from lightning_conv.kernels.planning.scale import Rates, fit_rates
from lightning_conv.kernels.planning.work import Work, work_of
from lightning_conv.reporting.markdown import markdown_table


@dataclass(frozen=True)
class Point:
    """A case in so many processes: what it was planned to do, and what it took."""

    case: Case
    ranks: int
    work: Work
    seconds: float  # of the processor, of the slowest process, in the fastest repetition
    wall: float
    sent: int


def points(sweeps: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the cases that were measured, each in 1, 2 and 4 processes."""
    found = []
    for case in CASES:
        plan = case.plan()
        for world in sweeps[0]:
            rounds = [one for sweep in sweeps for one in sweep[world][case.name]]
            fastest = min(rounds, key=lambda ranks: max(each["seconds"] for each in ranks))
            found.append(
                Point(
                    case=case,
                    ranks=int(world),
                    work=work_of(plan, int(world)),
                    seconds=max(each["seconds"] for each in fastest),
                    wall=min(max(each["wall"] for each in ranks) for ranks in rounds),
                    sent=max(each["sent"] for each in fastest),
                )
            )
    return found


def fitted(found: Sequence[Point]) -> Rates:
    """Return the rates that fit the cases which are for fitting."""
    used = [each for each in found if each.case.fitted]
    return fit_rates([each.work for each in used], [each.seconds for each in used])


def error(rates: Rates, point: Point) -> float:
    """Return by which share of what was measured the prediction is off."""
    return rates.seconds(point.work) / point.seconds - 1


def summary(errors: Sequence[float]) -> str:
    """Return median and worst of some errors in words."""
    sizes = [abs(each) for each in errors]
    return f"median {statistics.median(sizes):.0%}, worst {max(sizes):.0%}, {len(sizes)} cases"


def score_table(found: Sequence[Point], rates: Rates) -> str:
    """Return the table of the cases that the model was not fitted on."""
    rows = [
        (
            each.case.name,
            str(each.ranks),
            each.work.by,
            f"{each.seconds:.3f}",
            f"{rates.seconds(each.work):.3f}",
            f"{error(rates, each):+.0%}",
            f"{each.wall:.2f}",
            f"{each.sent / 2**20:.1f}",
            f"{each.work.sent / 2**20:.1f}",
        )
        for each in found
        if not each.case.fitted
    ]
    columns = ("kernel", "ranks", "divided by", "s", "predicted s", "error", "wall s", "MiB sent", "predicted MiB")
    return markdown_table(columns, rows)


def rate_table(rates: Rates, machine: Mapping[str, Any]) -> str:
    """Return the table of the constants, beside what the processor does in the calibration of a plan."""
    shares = {
        "matrices": f"{1 / rates.matrices / machine['flops']:.0%} of {machine['flops'] / 1e9:.0f} Gflop/s"
        if rates.matrices
        else "",
        "small": f"{1 / rates.small / machine['flops']:.0%} of {machine['flops'] / 1e9:.0f} Gflop/s"
        if rates.small
        else "",
        "moved": f"{1 / rates.moved / machine['bandwidth']:.0%} of {machine['bandwidth'] / 1e9:.1f} GB/s"
        if rates.moved
        else "",
    }
    return markdown_table(
        ("per", "seconds", "is"),
        [(name, f"{value:.3g}", shares.get(name, "")) for name, value in asdict(rates).items()],
    )


def prediction_table() -> str:
    """Return the table of the predictions; a kernel that its plan refuses has the reason."""
    rows = []
    for name, ranks, found in predictions():
        if isinstance(found, str):
            rows.append((name, str(ranks), "refused", found, "", "", ""))
            continue
        memory = f"{found.work.memory / 1e9:.1f} + {found.parameters / 1e9:.1f}"
        times = [f"{each:.3g}" for each in (found.seconds, found.divided, found.direct)]
        sent = f"{(found.work.sent + found.work.gathered) / 1e9:.1f}"
        rows.append((name, str(ranks), found.work.by, *times, f"{memory}; {sent}"))
    columns = (
        "measurement",
        "ranks",
        "divided by",
        "s",
        "s, divided by gloo",
        "s, divided over NVLink or InfiniBand",
        "GB: memory + parameters; sent",
    )
    return markdown_table(columns, rows)


def page(found: Mapping[str, Any]) -> str:
    """Return the page."""
    measured, machine = points(found["sweeps"]), found["machine"]
    rates = fitted(measured)
    errors = {used: [error(rates, each) for each in measured if each.case.fitted == used] for used in (True, False)}
    eigenvalues = ", ".join(f"{each / 1e9:.1f}" for each in machine["eigenvalues"])
    return f"""# The model of many ranks, scored

What [the model](../scale.md) predicts beside what kernels took in 1, 2 and 4 processes of one thread each, by
`ntk_gram(..., plan=, remeasure=True, processes=)`. Predicted are seconds of the processor of the slowest process,
in the fastest of {len(found["sweeps"])} sweeps of
{found["rounds"]} repetitions. Four processes share {machine["cores"]} cores here, so that the wall time, which is not predicted, is longer.

Made by `python benchmarks/scale_model.py` on {found["date"]}, {machine["processor"]}, {machine["cores"]} cores, torch {machine["torch"]}.

Sizes that the model was fitted on: {summary(errors[True])}. Sizes that it was not fitted on: {summary(errors[False])}.

![Predicted against measured seconds, with a band of 25 %](scale_model.png)

## Sizes that were not fitted

{score_table(measured, rates)}

## Constants

{rate_table(rates, machine)}

Eigenvalues of matrices of 1,000 and 2,000 rows in float64: {eigenvalues} Gflop/s.

## Predictions for NVIDIA H100

Nothing of this was measured. What is assumed: [the model](../scale.md#what-is-assumed).

{prediction_table()}

![Predicted seconds of a ResNet-50's kernel against the number of devices](scale_ranks.png)

*s* is what the engine does: where dividing by gloo takes longer than computing, each rank computes the whole kernel.
"""
