"""The page: the measurements as tables, and notes on how to read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers.methods import METHODS, ORACLES, Method

from lightning_conv.reporting.markdown import markdown_table
from ntk_bench.agreement import TOLERANCE, Agreement
from ntk_bench.measure import CaseResult, Outcome

WRONG = 1e-2
"""Relative distance from which a float32 matrix counts as a different kernel, not a rounded one."""


@dataclass(frozen=True)
class Run:
    """All measurements of one call."""

    results: Sequence[CaseResult]
    agreements: Sequence[Agreement]
    methods: Sequence[Method]
    versions: Mapping[str, str]
    missing: Mapping[str, str]  # method -> why it is not there
    facts: Mapping[str, Any]  # date, cpu, threads, memory, command, peak, ...


def counts(outcome: Outcome) -> bool:
    """Return whether a time belongs to the requested kernel."""
    right = outcome.error is None or outcome.error < WRONG
    return outcome.median is not None and right


def best_peer(result: CaseResult) -> tuple[str, float] | None:
    """Return name and seconds of the fastest method that is not this library."""
    times = [
        (name, outcome.median)
        for name, outcome in result.outcomes.items()
        if not METHODS[name].ours and counts(outcome) and outcome.median is not None
    ]
    return min(times, key=lambda item: item[1]) if times else None


def render(run: Run, figure: str | None) -> str:
    """Format the whole page as Markdown."""
    facts = run.facts
    parts = [
        "# The kernel engine against its peers\n",
        f"Made by `{facts['command']}` on {facts['date']}, {facts['cpu']}, {facts['threads']} threads, "
        f"{facts['memory']}. Versions: " + ", ".join(f"{n} {v}" for n, v in sorted(run.versions.items())) + ".\n",
    ]
    if facts["quick"]:
        parts.append("**Tiny versions of the cases, to test the benchmark: the times mean nothing.**\n")
    if run.missing:
        parts.append("Not measured: " + "; ".join(f"{METHODS[n].label}: {r}" for n, r in run.missing.items()) + ".\n")
    if all(method.environment == "library" for method in run.methods if method.name not in run.missing):
        parts.append("None of the libraries of `.peers` was measured (`make bench-peers` makes them).\n")
    parts += _tables(run, figure) + _agreement(run) + _notes(run)
    return "\n".join(parts)


def _tables(run: Run, figure: str | None) -> list[str]:
    if not run.results:
        return []
    present = [method for method in run.methods if method.name not in run.missing]
    shown = [m for m in present if any(r.outcomes[m.name].status != "left out" for r in run.results)]

    def table(cell: Callable[[CaseResult, Outcome], str]) -> list[str]:
        rows = [[r.case.title, *(cell(r, r.outcomes[m.name]) for m in shown)] for r in run.results]
        return [markdown_table(["case", *(m.label for m in shown)], rows) + "\n"]

    peak = run.facts["gemm_peak"]
    parts = ["## Seconds\n", *table(lambda _, outcome: _seconds(outcome))]
    parts.append("s: one timing only. x: another kernel than the one asked for. `-`: see the reasons below.\n")
    if figure:
        parts.append(f"![Seconds for each case and method, logarithmic]({figure})\n")
    parts += ["## Against the fastest peer, and against the machine\n", _ratios(run, peak)]
    parts.append(
        "Ratio: seconds of the fastest peer over seconds of this library; of `neural-tangents` compiling is not counted, "
        "whose counterpart is `planned`, where the network was read before, as calls with `plan=` have it (monitors "
        "read anew, because the rounding of the Jacobian is measured at the present weights). Reading: "
        "the difference of the two, what a kernel that is computed once pays for finding and checking the layer rules, about as "
        "much as ten passes of three samples and a float64 copy of the parameters; it grows with the parameters and not with n. GF: "
        "floating-point operations that the "
        f"library's plan counts; share: of the best rate of `torch.mm` in the first call, {peak / 1e9:.0f} GF/s. Beside: median "
        "rate of a product of 1024 x 1024 matrices next to the repetitions, and the largest over the smallest rate of the "
        "rounds.\n"
    )
    parts += _behind(run)
    parts += ["## Peak memory, MiB above the level before\n", *table(lambda _, outcome: _mebibytes(outcome.peak_bytes))]
    parts += ["## Distance to float64\n", *table(lambda _, outcome: _distance(outcome.error))]
    parts.append(
        'Relative Frobenius distance of the float32 matrix to `precision="certified"`. A network with ReLU can land on the '
        "other side of a kink in float32, for any method, and then differs by far more than rounding; that is no "
        "disagreement about the kernel, which the next section settles in float64.\n"
    )
    naive = [r for r in run.results if any(o.error_naive is not None for o in r.outcomes.values())]
    if naive:
        rows = [[r.case.title, *(_distance(r.outcomes[m.name].error_naive) for m in shown)] for r in naive]
        parts += [
            "The same against the double loop:\n",
            markdown_table(["case", *(m.label for m in shown)], rows) + "\n",
        ]
    return parts + _reasons(run, shown)


def _ratios(run: Run, peak: float) -> str:
    rows = []
    for result in run.results:
        peer = best_peer(result)
        names = ("library-fast", "library-planned", "library-exact")
        fast, planned, exact = (result.outcomes.get(name, Outcome()) for name in names)
        gemm = [rate for outcome in result.outcomes.values() for rate in outcome.gemm]
        flops, promised = result.plan.get("flops"), result.plan.get("bytes")
        rate = flops / fast.median if flops and fast.median else None
        used = fast.peak_bytes
        rows.append(
            [
                result.case.title,
                f"{METHODS[peer[0]].label}, {_number(peer[1])} s" if peer else "-",
                *(
                    f"{peer[1] / o.median:.2f}" if peer and o.median and counts(o) else "-"
                    for o in (fast, planned, exact)
                ),
                f"{fast.median - planned.median:.2g}" if (fast.median or 0) > (planned.median or math.inf) else "-",
                f"{flops / 1e9:.1f}" if flops else "-",
                f"{rate / 1e9:.0f} ({100 * rate / peak:.0f} %)" if rate else "-",
                f"{_mebibytes(used)} / {_mebibytes(promised)}" if promised else "-",
                f"{sorted(gemm)[len(gemm) // 2] / 1e9:.0f} ({result.spread:.2f})" if gemm else "-",
            ]
        )
    head = [
        "case",
        "fastest peer",
        "ratio, fast",
        "ratio, planned",
        "ratio, exact",
        "reading, s",
        "GF",
        "GF/s (share), fast",
    ]
    return markdown_table([*head, "MiB used / promised, fast", "GF/s beside (spread)"], rows) + "\n"


def _behind(run: Run) -> list[str]:
    """Describe where a peer is faster, by how much, and what takes the time."""
    lines = []
    for result in run.results:
        peer, names = best_peer(result), ("library-fast", "library-planned")
        fast, planned = (result.outcomes.get(name, Outcome()).median for name in names)
        if peer is None or not fast or not planned or peer[1] >= fast:
            continue
        text = f"- {result.case.title}: `fast` takes {fast / peer[1]:.2f} times as long as {METHODS[peer[0]].label}"
        if planned <= peer[1]:
            text += f"; {_number(fast - planned)} s of its {_number(fast)} s are reading, without which it takes {planned / peer[1]:.2f}"
        else:
            flops = result.plan.get("flops", math.nan)
            text += (
                f", without reading {planned / peer[1]:.2f}: {flops / 1e9:.1f} GF are so few that what is around the products counts, the "
                "sums in float64 and the norms for the error floor, which no peer computes"
            )
        lines.append(text)
    return ["## Where a peer is faster\n", *lines, ""] if lines else []


def _reasons(run: Run, shown: Sequence[Method]) -> list[str]:
    cases: dict[str, list[str]] = {}

    def note(what: str, reason: str | None, result: CaseResult) -> None:
        if reason:
            cases.setdefault(f"{what}: {reason}", []).append(result.case.name)

    for result in run.results:
        for method in shown:
            note(method.label, result.outcomes[method.name].reason, result)
        note("distance to float64", result.oracles.get("certified"), result)
        note("plan", result.plan.get("missing"), result)
    lines = [f"- {text} ({', '.join(names)})" for text, names in cases.items()]
    return ["## Why there is no number\n", *lines, ""] if lines else []


def _agreement(run: Run) -> list[str]:
    if not run.agreements:
        return []
    names = [ORACLES["certified"], *(method for method in run.methods if method.name not in run.missing)]
    rows = [
        [f"{a.case.title}, {a.case.outputs}, n = {a.case.shape[0]}", *(_distance(a.distances[m.name]) for m in names)]
        for a in run.agreements
    ]
    wrong = [f"{a.case.name}: {', '.join(a.disagreeing())}" for a in run.agreements if a.disagreeing()]
    reasons: dict[str, list[str]] = {}
    for a in run.agreements:
        for m in names:
            if isinstance(a.distances[m.name], str):
                reasons.setdefault(f"{m.label}: {a.distances[m.name]}", []).append(a.case.name)
    return [
        "## Agreement in float64\n",
        "Small networks with smooth activations, every method run in float64; relative Frobenius distance to the double loop "
        f"of `autograd.grad`. Methods agree up to {TOLERANCE:.0e}: "
        + (f"**not so** {'; '.join(wrong)}.\n" if wrong else "all of them do.\n"),
        markdown_table(["network", *(m.label for m in names)], rows) + "\n",
        *(f"- {text} ({', '.join(cases)})" for text, cases in reasons.items()),
        "",
    ]


def _notes(run: Run) -> list[str]:
    facts = run.facts
    lines = [
        "## How it was measured\n",
        f"One process a method, all methods of a case in one call: a first one, then turns, one repetition each, {facts['repetitions']} "
        "of them or, from 2 s on, three fifths of that; medians. Before each turn the others are idle for 0.6 s, in the "
        "middle of which a product of two 1024 x 1024 matrices is timed. When these rates differ by more than 20 % between "
        "rounds, the case is repeated, at most twice, and the calmest attempt counts. A first call longer than "
        f"{facts['limit']:.0f} s is the only timing (compilation does not count); after {facts['stop']:.0f} s a method is "
        "stopped. Loading weights and data is not timed. Weights, data and BatchNorm statistics are random, from seed 0.\n",
        "What to keep in mind: one CPU, one seed. The peers run as their documentation has it, whole batch, and were not "
        "tuned case by case; this library was developed on cases like these. `neural-tangents` needs jax 0.4.23, so it has "
        "another compiler and other matrix products than the rest. Peak memory does not count what a process holds between "
        "calls, nor what compiling takes. The matrix of this library is float64, those of the peers float32. No row is a "
        "statement about GPUs.\n",
        markdown_table(["method", "as configured"], [[m.label, m.configuration] for m in run.methods]) + "\n",
    ]
    return lines


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _seconds(outcome: Outcome) -> str:
    if outcome.median is None:
        return outcome.reason.removeprefix("stopped after ").join(("> ", "")) if outcome.status == "stopped" else "-"
    mark = " s" if outcome.status == "single" else ""
    return _number(outcome.median) + mark + ("" if counts(outcome) else " x")


def _mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def _distance(value: float | str | None) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "-"
