"""Agreement of all methods, in float64 on small smooth networks, with the double loop over all pairs of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ntk_bench.cases import Case
from ntk_bench.measure import distance
from ntk_bench.pool import START, Failed, Process

TOLERANCE = 1e-10
"""Relative Frobenius distance in float64 up to which two methods agree."""


@dataclass(frozen=True)
class Agreement:
    """Distances of one case: for each method the relative Frobenius distance to the double loop, or why there is none."""

    case: Case
    distances: dict[str, float | str]

    def disagreeing(self) -> list[str]:
        """List the methods whose matrix disagrees."""
        # Written so that a NaN counts as a disagreement.
        return [n for n, d in self.distances.items() if isinstance(d, float) and not d <= TOLERANCE]


def agree(
    cases: Sequence[Case],
    processes: Sequence[Process],
    naive: Process,
    certified: Process,
    folder: Path,
    say: Callable[[str], None],
) -> list[Agreement]:
    """Compare this library's certified kernel and every method, run in float64, with the double loop."""
    found = []
    for case in cases:
        arrays, oracle, saved = folder / "case.npz", folder / "naive.npy", folder / "result.npy"
        case.write(arrays)
        prepare = {"op": "prepare", "case": case.message(), "arrays": str(arrays), "dtype": "float64"}
        naive.ask(prepare, START)
        naive.ask({"op": "run", "save": str(oracle)}, START)
        distances: dict[str, float | str] = {}
        for process in [certified, *processes]:
            name = process.method.name
            if process.missing is not None:
                distances[name] = process.missing
                continue
            try:
                process.ask(prepare, START)
                process.ask({"op": "run", "save": str(saved)}, START)
                distances[name] = distance(saved, oracle)
            except Failed as error:
                distances[name] = str(error)
        found.append(Agreement(case, distances))
        say(f"  {case.name}: {', '.join(found[-1].disagreeing()) or 'all agree'}")
    for path in folder.glob("*.np[yz]"):
        path.unlink()
    return found
