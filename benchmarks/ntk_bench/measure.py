"""The measurement of one case: all methods warm up, then take turns; every matrix is compared with a float64 one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ntk_bench.calibration import gemm_rate
from ntk_bench.cases import Case
from ntk_bench.pool import START, Failed, Process, Stopped

PAUSE = 0.3
"""Pause in seconds before and after the matrix products that precede each turn."""
UNREST = 1.2
"""Ratio of the rates of matrix products beside the rounds from which a case is repeated."""
ATTEMPTS = 3


@dataclass(frozen=True)
class Settings:
    """Limits of the measurement."""

    repetitions: int  # for calls below 2 s; three fifths of it, rounded up, for longer ones
    limit: float  # seconds of a warm-up beyond which it is the only timing
    stop: float  # seconds after which a turn is ended
    quick: bool

    def beside(self) -> float:
        """Measure the rate of matrix products, within a pause in which the threads of the others stop spinning."""
        pause = 0.0 if self.quick else PAUSE
        time.sleep(pause)
        rate = gemm_rate(128 if self.quick else 1024)
        time.sleep(pause)
        return rate


@dataclass
class Outcome:
    """The result of one method on one case."""

    status: str = "measured"  # "single": one timing; "stopped", "failed", "missing", "left out": none
    reason: str = ""
    warm_up: float | None = None  # seconds of the first call, compilation included
    seconds: list[float] = field(default_factory=list)
    gemm: list[float] = field(default_factory=list)  # flops per second beside each repetition
    peak: list[int] = field(default_factory=list)  # bytes above the level before, each repetition
    error: float | None = None  # relative Frobenius distance to the certified matrix
    error_naive: float | None = None  # to the double loop

    @property
    def median(self) -> float | None:
        """Median seconds of the repetitions."""
        return median(self.seconds) if self.seconds else None

    @property
    def peak_bytes(self) -> int | None:
        """Largest peak in bytes."""
        return max(self.peak) if self.peak else None


@dataclass
class CaseResult:
    """All methods on one case."""

    case: Case
    outcomes: dict[str, Outcome]
    oracles: dict[str, str]  # reason why an oracle is missing, or ""
    plan: dict[str, Any]
    attempts: int = 1
    spread: float = 1.0  # largest over smallest rate of matrix products beside the rounds


def distance(path: Path, oracle: Path) -> float:
    """Compute |A - B|_F / |B|_F of two saved matrices; infinite for different shapes."""
    a, b = np.load(path, mmap_mode="r"), np.load(oracle, mmap_mode="r")
    if a.shape != b.shape:
        return float("inf")
    apart = whole = 0.0
    for start in range(0, len(b), 512):
        rows = np.asarray(b[start : start + 512])
        apart += float(np.square(a[start : start + 512] - rows).sum())
        whole += float(np.square(rows).sum())
    return float(np.sqrt(apart / whole)) if whole else float("inf")


def measure(
    case: Case,
    processes: Sequence[Process],
    oracles: Sequence[Process],
    settings: Settings,
    folder: Path,
    say: Callable[[str], None],
) -> CaseResult:
    """Run a case on all methods. The files of the case are removed from ``folder`` afterwards."""
    arrays = folder / "case.npz"
    case.write(arrays)
    prepare = {"op": "prepare", "case": case.message(), "arrays": str(arrays), "dtype": "float32"}
    missing = {process.method.name: _oracle(process, case, prepare, settings, folder) for process in oracles}
    outcomes = {process.method.name: Outcome() for process in processes}
    plan: dict[str, Any] = {"missing": "this library is not measured"}
    ready = []
    for process in processes:
        outcome = outcomes[process.method.name]
        if process.missing is not None:
            outcome.status, outcome.reason = "missing", process.missing
        elif case.sweep and process.method.jacobian:
            outcome.status, outcome.reason = "left out", "forms the Jacobian; see the first rows"
        elif case.outputs == "projected" and not process.method.ours:
            outcome.status, outcome.reason = "left out", "has no projected kernel"
        else:
            _warm_up(process, outcome, prepare, settings, folder, missing)
            say(f"  {process.method.name:14} first call {_text(outcome)}")
            if outcome.status == "measured":
                ready.append(process)
            if process.method.name == "library-fast" and outcome.status in ("measured", "single"):
                plan = _plan(process)
    result = CaseResult(case, outcomes, missing, plan)
    for attempt in range(1, ATTEMPTS + 1):
        turns, spread = _rounds(ready, outcomes, settings)
        # Of several attempts the one with the smallest spread counts.
        if attempt == 1 or spread < result.spread:
            result.spread = spread
            for name, turn in turns.items():
                outcomes[name].seconds, outcomes[name].gemm, outcomes[name].peak = turn
        result.attempts = attempt
        if spread <= UNREST or settings.quick:
            break
        say(f"  unrest: matrix products differ by {100 * (spread - 1):.0f} % between rounds")
    for process in processes:
        if process.process is not None:
            process.ask({"op": "release"}, START)
    for path in folder.glob("*.np[yz]"):
        path.unlink()
    return result


def _oracle(process: Process, case: Case, prepare: dict[str, Any], settings: Settings, folder: Path) -> str:
    """Save the matrix of an oracle, or return the reason why that is not possible."""
    if case.outputs == "projected":
        return "an estimate by design"
    try:
        process.ask(prepare | {"dtype": "float64"}, START)
        # It is not timed, so it may take longer than the methods.
        process.ask({"op": "run", "save": str(folder / f"{process.method.name}.npy")}, 5 * settings.stop)
        process.ask({"op": "release"}, START)
    except Failed as error:
        return str(error)
    return ""


def _warm_up(
    process: Process,
    outcome: Outcome,
    prepare: dict[str, Any],
    settings: Settings,
    folder: Path,
    oracles: dict[str, str],
) -> None:
    """Make the first call and compare its matrix; a call longer than the limit is the only one."""
    saved = folder / f"result-{process.method.name}.npy"
    try:
        process.ask(prepare, START)
        beside = settings.beside()
        answer = process.ask({"op": "run", "save": str(saved)}, settings.stop)
        outcome.warm_up = answer["seconds"]
        if process.method.compiles and answer["seconds"] > settings.limit:
            beside = settings.beside()
            answer = process.ask({"op": "run"}, settings.stop)
    except Failed as error:
        outcome.status = "stopped" if isinstance(error, Stopped) else "failed"
        outcome.reason = str(error)
        return
    if answer["seconds"] > settings.limit:
        outcome.status, outcome.reason = "single", f"one timing: longer than {settings.limit:.0f} s"
        outcome.seconds, outcome.gemm = [answer["seconds"]], [beside]
        outcome.peak = [] if answer["peak"] is None else [answer["peak"]]
    errors = {name: distance(saved, folder / f"{name}.npy") for name, reason in oracles.items() if not reason}
    outcome.error, outcome.error_naive = errors.get("certified"), errors.get("naive")
    saved.unlink()


def _plan(process: Process) -> dict[str, Any]:
    try:
        return process.ask({"op": "plan"}, START)
    except Failed as error:
        return {"missing": str(error)}


def _rounds(
    ready: Sequence[Process], outcomes: dict[str, Outcome], settings: Settings
) -> tuple[dict[str, tuple[list[float], list[float], list[int]]], float]:
    """Take turns, method after method, until each has enough; return how much the machine changed between the rounds."""
    turns: dict[str, tuple[list[float], list[float], list[int]]] = {p.method.name: ([], [], []) for p in ready}
    rates = []
    for number in range(settings.repetitions):
        beside = []
        for process in ready:
            seconds, gemm, peak = turns[process.method.name]
            outcome = outcomes[process.method.name]
            if outcome.status != "measured":
                continue
            if number >= -(-3 * settings.repetitions // 5) and median(seconds) >= 2:
                continue
            beside.append(settings.beside())
            try:
                answer = process.ask({"op": "run"}, settings.stop)
            except Failed as error:
                outcome.status, outcome.reason = "failed", f"in repetition {number + 1}: {error}"
                continue
            seconds.append(answer["seconds"])
            gemm.append(beside[-1])
            peak += [] if answer["peak"] is None else [answer["peak"]]
        if beside:
            rates.append(median(beside))
    return turns, max(rates) / min(rates) if rates else 1.0


def _text(outcome: Outcome) -> str:
    if outcome.warm_up is None:
        return f"- {outcome.status}: {outcome.reason}"
    return f"{outcome.warm_up:.3f} s, error {outcome.error}"
