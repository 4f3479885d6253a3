"""Compare the kernel engine with its peers: time, memory and agreement; write docs/results/ntk.md, ntk.json and ntk.png.

    python benchmarks/ntk.py                          everything; takes hours with all peers
    python benchmarks/ntk.py --quick --out /tmp/ntk   tiny versions of all cases, a few minutes
    python benchmarks/ntk.py --cases "mlp-*" agreement --methods "library-*" nt-structured
    python benchmarks/ntk.py --add                    the cases that an interrupted run has not reached

`make bench-peers` creates the environments of the peers; without them this library is measured alone. The page is written
after every case, so an interrupted run keeps its finished cases.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from ntk_bench.agreement import Agreement, agree
from ntk_bench.calibration import gemm_peak, memory_bytes, processor
from ntk_bench.cases import Case, agreement_cases, cases
from ntk_bench.figure import draw
from ntk_bench.measure import CaseResult, Outcome, Settings, measure
from ntk_bench.page import Run, render
from ntk_bench.pool import Process
from peers.methods import METHODS, ORACLES

import lightning_conv

OUT = Path(__file__).parent.parent / "docs" / "results"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny versions of all cases, to test the benchmark")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="names of cases, or agreement")
    parser.add_argument("--methods", nargs="+", default=["*"], metavar="PATTERN", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--repetitions", type=int, help="for what takes less than 2 s (default 5; 2 with --quick)")
    parser.add_argument("--limit", type=float, default=60.0, help="a longer first call is the only timing (seconds)")
    parser.add_argument("--stop", type=float, default=180.0, help="a longer call is ended (seconds)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--add", action="store_true", help="keep the cases of the results that are there, measure the others"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default docs/results; needed with --quick)")
    found = parser.parse_args()
    if found.quick and found.out is None:
        parser.error("--quick: its times mean nothing and do not belong into docs/results; pass --out FOLDER")
    return found


def selected(names: Sequence[str], patterns: Sequence[str], option: str) -> list[str]:
    """Return the names that match; a pattern without any match is an error."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            sys.exit(f"{option}: {pattern!r} matches none of {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def main() -> int:
    """Measure the selected cases; return 1 if methods disagree in float64."""
    asked = arguments()
    out = asked.out or OUT
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(asked.threads)
    repetitions = asked.repetitions or (2 if asked.quick else 5)
    settings = Settings(repetitions=repetitions, limit=asked.limit, stop=asked.stop, quick=asked.quick)
    everything = cases(asked.quick)
    chosen = selected([case.name for case in everything] + ["agreement"], asked.cases, "--cases")
    methods = [METHODS[name] for name in selected(list(METHODS), asked.methods, "--methods")]
    with tempfile.TemporaryDirectory(prefix="ntk-") as name:
        folder = Path(name)
        processes = [Process(method, asked.threads, folder) for method in methods]
        oracles = {name: Process(method, asked.threads, folder) for name, method in ORACLES.items()}
        try:
            return _run(asked, out, settings, everything, chosen, processes, oracles, folder)
        finally:
            for process in [*processes, *oracles.values()]:
                process.close()


def _run(
    asked: argparse.Namespace,
    out: Path,
    settings: Settings,
    everything: Sequence[Any],
    chosen: Sequence[str],
    processes: Sequence[Process],
    oracles: dict[str, Process],
    folder: Path,
) -> int:
    for process in [*processes, *oracles.values()]:
        if not process.available():
            print(f"{process.method.label}: {process.missing}", flush=True)
    memory = memory_bytes()
    facts: dict[str, Any] = {
        "date": str(date.today()),
        "cpu": processor(),
        "threads": asked.threads,
        "memory": f"{memory / 2**30:.0f} GiB of memory" if memory else "unknown memory",
        "command": "python " + shlex.join(["benchmarks/ntk.py", *sys.argv[1:]]),
        "quick": asked.quick,
        "repetitions": settings.repetitions,
        "limit": settings.limit,
        "stop": settings.stop,
        "gemm_peak": gemm_peak(asked.quick),
    }
    results, agreements = _kept(out / "ntk.json", facts) if asked.add else ([], [])
    if asked.cases != ["*"]:  # cases that were named are measured again
        results = [result for result in results if result.case.name not in chosen]
    done = {result.case.name for result in results}

    def write() -> None:
        versions = {"lightning_conv": lightning_conv.__version__, "python": sys.version.split()[0]}
        for process in processes:
            versions |= process.versions
        absent = {p.method.name: p.missing for p in processes if p.missing is not None}
        run = Run(results, agreements, [p.method for p in processes], versions, absent, facts)
        drawn = bool(results) and draw(results, run.methods, out / "ntk.png")
        (out / "ntk.md").write_text(render(run, "ntk.png" if drawn else None))
        (out / "ntk.json").write_text(json.dumps(_plain(run), indent=1) + "\n")

    if "agreement" in chosen and not agreements:
        print("agreement in float64", flush=True)
        agreements += agree(
            agreement_cases(), processes, oracles["naive"], oracles["certified"], folder, lambda text: print(text)
        )
        write()
    compared = [oracles["certified"], *([oracles["naive"]] if asked.quick else [])]
    for case in everything:
        if case.name in chosen and case.name not in done:
            print(f"{case.name}: {case.title}", flush=True)
            earlier = facts.pop("earlier", "")
            if earlier:
                facts["command"] = (
                    earlier if facts["command"] in earlier.split("; ") else f"{earlier}; {facts['command']}"
                )
            results.append(measure(case, processes, compared, settings, folder, lambda text: print(text, flush=True)))
            results.sort(key=lambda result: [other.name for other in everything].index(result.case.name))
            facts["gemm_peak"] = max(facts["gemm_peak"], gemm_peak(asked.quick))
            write()
    if len(results) == len(done):
        facts["command"] = facts.pop("earlier", facts["command"])
        write()  # the page may have changed
    print(f"written: {out / 'ntk.md'}", flush=True)
    return 1 if any(agreement.disagreeing() for agreement in agreements) else 0


def _kept(path: Path, facts: dict[str, Any]) -> tuple[list[CaseResult], list[Agreement]]:
    """Load the results of an earlier run on this processor with these settings, and take over its facts."""
    earlier = json.loads(path.read_text())
    for name in ("cpu", "threads", "quick", "repetitions", "limit", "stop"):
        if earlier["facts"][name] != facts[name]:
            sys.exit(
                f"--add: {path} was made with {name} = {earlier['facts'][name]}, not {facts[name]}; measure all of it anew"
            )
    facts["earlier"] = earlier["facts"]["command"]
    facts["gemm_peak"] = max(facts["gemm_peak"], earlier["facts"]["gemm_peak"])
    first, *_ = earlier["facts"]["date"].split(" to ")
    facts["date"] = first if first == facts["date"] else f"{first} to {facts['date']}"
    results = []
    for one in earlier["cases"]:
        fields = {name: value for name, value in one.items() if name != "medians"}
        fields["case"] = _case(one["case"])
        fields["outcomes"] = {name: Outcome(**outcome) for name, outcome in one["outcomes"].items()}
        results.append(CaseResult(**fields))
    return results, [Agreement(_case(one["case"]), one["distances"]) for one in earlier["agreement"]]


def _case(stored: dict[str, Any]) -> Case:
    return Case(**{**stored, "shape": tuple(stored["shape"])})


def _plain(run: Run) -> dict[str, Any]:
    """Return all measurements with every repetition, for the JSON file."""
    return {
        "facts": dict(run.facts),
        "versions": dict(run.versions),
        "missing": dict(run.missing),
        "methods": {method.name: asdict(method) for method in run.methods},
        "cases": [asdict(result) | {"medians": _medians(result)} for result in run.results],
        "agreement": [asdict(agreement) for agreement in run.agreements],
    }


def _medians(result: CaseResult) -> dict[str, float | None]:
    return {name: outcome.median for name, outcome in result.outcomes.items()}


if __name__ == "__main__":
    sys.exit(main())
