"""Measure what the diagnostics cost: runs with and without them, in pairs; write docs/results/overhead.md.

``python benchmarks/overhead.py`` measures what is missing in docs/results/overhead.json, pair by pair, and writes the page whenever a run
is done: it can be stopped and goes on where it was.

    --long NAME ...    these of the long runs (none: no long one); any member of the zoo can be made long
    --short NAME ...   these of the short ones (none: no short one)
    --rounds N         pairs of runs
    --seconds S        what a long run takes at least, alone
    --json PATH        another file of results; the page is then printed, not written
    --fresh            measure the chosen runs anew
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from ntk_bench.calibration import processor
from overhead_bench.measure import Pair, SharedCore, case_of, epochs_for, in_turn, quiet, took
from overhead_bench.runs import MANY, long_runs, short_runs

from lightning_conv.reporting.markdown import markdown_table

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SECONDS, ROUNDS = 20.0, 3
LONG_LIMIT, SHORT_LIMIT, MEASUREMENTS = 1.10, 2.0, 3
"""Largest ratio of a long run, most seconds more of a short one, and fewest measurements with bounds of a long one."""

Results = dict[str, dict[str, Any]]
PairMaker = Callable[[str, str, "int | None", int], "Pair | str"]
COLUMNS = ("run", "seconds alone", "seconds more", "ratio: median (smallest, largest)", "ratio of processor time",
           "measurements with bounds", "seconds of the first", "what is measured")  # fmt: skip


def measure(results: Results, kind: str, name: str, options: argparse.Namespace, make: PairMaker) -> None:
    """Add the missing pairs of one run to the results, and keep them after each."""
    key = f"{kind} {name}"
    found = results.setdefault(key, {"epochs": None, "pairs": []})
    while len(found["pairs"]) < options.rounds and "refused" not in found:
        if kind == "long" and found["epochs"] is None:
            found["epochs"] = epochs_for(case_of(kind, name), options.seconds)
        made = make(kind, name, found["epochs"], len(found["pairs"]))
        if isinstance(made, str):
            found["refused"] = made
            print(f"  {key}: {made}", flush=True)
        else:
            found["pairs"].append(asdict(made))
            print(
                f"  {key}: {made.plain:.2f} s alone, {made.more:+.2f} s, ratio {made.ratio:.3f}, {made.measurements} measurements, "
                f"first {made.first:.2f} s, {made.chosen}",
                flush=True,
            )
        options.json.write_text(json.dumps(results, indent=1))


def row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of the table, with the columns ``COLUMNS``."""
    pairs = [Pair(**each) for each in found["pairs"]]
    if not pairs:
        return (f"`{name}`", "", "", "", "", "", "", found.get("refused", ""))
    ratios = [each.ratio for each in pairs]
    return (
        f"`{name}`",
        f"{statistics.median(each.plain for each in pairs):.2f}",
        f"{statistics.median(each.more for each in pairs):.2f}",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})",
        f"{statistics.median(each.of_processor for each in pairs):.3f}",
        str(min(each.measurements for each in pairs)),
        f"{statistics.median(each.first for each in pairs):.2f}",
        pairs[-1].chosen,
    )


def verdict(results: Results) -> str:
    """Return which runs cost more than they were promised to, in words."""
    dear = []
    for key, found in results.items():
        pairs = [Pair(**each) for each in found["pairs"]]
        if not pairs:
            continue
        ratio, more = (statistics.median(values) for values in ([p.ratio for p in pairs], [p.more for p in pairs]))
        if key.startswith("long") and (ratio > LONG_LIMIT or min(p.measurements for p in pairs) < MEASUREMENTS):
            dear.append(f"`{key}`")
        if key.startswith("short") and more > SHORT_LIMIT:
            dear.append(f"`{key}`")
    promised = (
        f"A run of {SECONDS:.0f} s or more should take at most {LONG_LIMIT:.2f} times as long, with {MEASUREMENTS} measurements with "
        f"bounds or more; a shorter one at most {SHORT_LIMIT:.0f} s more."
    )
    return f"{promised} That does not hold of {', '.join(dear)}." if dear else f"{promised} That holds of all of them."


def page(results: Results) -> str:
    """Return the page."""
    tables = {
        kind: markdown_table(
            COLUMNS, [row(key.split()[1], found) for key, found in results.items() if key.split()[0] == kind]
        )
        for kind in ("long", "short")
    }
    rounds = sorted({len(found["pairs"]) for found in results.values() if found["pairs"]})
    pairs = " to ".join(str(count) for count in dict.fromkeys((*rounds[:1], *rounds[-1:])))
    machine = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    return f"""# What the diagnostics cost

Runs with `ConvergenceDiagnostics()` at its defaults against the same runs without, both with TensorBoard.
Pairs of runs per row: {pairs}. Made by `python benchmarks/overhead.py` on {date.today()}, {machine}.
Long runs of a pair are made at the same time, by two processes that take turns of milliseconds on one core, and what is compared, and
what the diagnostics keep their budget by, are the seconds that each of them had of the processor: the speed of the machine changes by a
third within minutes, that of one core against the other by a tenth, and so acts on both alike. Short ones are made one after the other.
Seconds are those of `Trainer.fit`, the first and the last measurement included.

{verdict(results)}

## Runs of {SECONDS:.0f} seconds or more

Members of the zoo (`tests/zoo/`) with {MANY} samples, a GPT of two layers over 64 tokens and 16 positions, and the recipe `WideFC` on the
digits, each for as many epochs as the time takes.

{tables["long"]}

## Short runs

Members of the zoo as they are.

{tables["short"]}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--long", nargs="*", default=list(long_runs()), choices=sorted({*long_runs(), *short_runs()}), metavar="NAME"
    )
    parser.add_argument("--short", nargs="*", default=list(short_runs()), choices=sorted(short_runs()), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--json", type=Path, default=RESULTS / "overhead.json")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(arguments)
    quiet()
    results: Results = json.loads(options.json.read_text()) if options.json.exists() else {}
    chosen = [("long", name) for name in options.long] + [("short", name) for name in options.short]
    if options.fresh:
        results = {key: found for key, found in results.items() if tuple(key.split()) not in chosen}
    took("short", "dict_batch", None, True)  # loads what is loaded once
    begun, beside = time.monotonic(), SharedCore() if options.long else None
    for number, (kind, name) in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}, {kind} {name}, {time.monotonic() - begun:.0f} s gone", flush=True)
        measure(results, kind, name, options, beside if kind == "long" and beside else in_turn)
        if options.json.parent == RESULTS:
            (RESULTS / "overhead.md").write_text(page(results))
    if beside:
        beside.close()
    print(page(results))


if __name__ == "__main__":
    main()
