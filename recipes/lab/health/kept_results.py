"""``KeptResults``: finished runs of a study in a file, one a line, so that a study that was cut off goes on where it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lightning_conv.reporting.progress import Lines, progress_bar

Result = TypeVar("Result")


class Named(Protocol):
    """A run that is to be done."""

    @property
    def key(self) -> str:
        """What tells it from all others."""


Todo = TypeVar("Todo", bound=Named)


class KeptResults:
    """The results of runs by their keys.

    Args:
        path: The file, in JSON lines; a line that was cut off is left out. None: nothing is kept.

    Attributes:
        known: The results by key.
        before: How many were known at first.

    Raises:
        ValueError: The file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        self.before = 0
        self._cut = False  # the last line has no end
        if path is not None and path.exists():
            text = path.read_text()
            self._cut = bool(text) and not text.endswith("\n")
            for number, line in enumerate(text.splitlines(), 1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if not isinstance(row, dict) or row.keys() != {"key", "result"}:
                    raise ValueError(f"keep: line {number} of {path} is no result of a study; name another file")
                self.known[row["key"]] = row["result"]
        self.before = len(self.known)

    @property
    def words(self) -> str:
        """How many results are from an earlier call, in a sentence after a space; empty: none."""
        kept = "1 run is" if self.before == 1 else f"{self.before} runs are"
        return f" {kept} kept from an earlier call." if self.before else ""

    def keep(self, key: str, result: Any) -> None:
        """Keep a result.

        Args:
            key: Of the run.
            result: In the types of JSON.
        """
        self.known[key] = result
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n" if self._cut else "")
                file.write(json.dumps({"key": key, "result": result}) + "\n")
            self._cut = False

    def results(
        self,
        todo: Sequence[Todo],
        make: Callable[[Todo], Result],
        *,
        write: Callable[[Result], Any],
        read: Callable[[Any], Result],
        title: str,
        seconds: float,
    ) -> list[Result]:
        """Return the results of all runs; those that are known are not done again.

        Args:
            todo: The runs.
            make: Does one.
            write: Turns its result into the types of JSON.
            read: Inverse of ``write``.
            title: Of the line that shows the progress.
            seconds: Duration of a run, about.
        """
        found: list[Result] = []
        missing = sum(each.key not in self.known for each in todo)
        lines = None if sys.stderr.isatty() else Lines(_say, title, predicts=True)
        with progress_bar(title, seconds * missing, lines) as report:
            for number, each in enumerate(todo):
                if each.key not in self.known:
                    self.keep(each.key, write(make(each)))
                found.append(read(self.known[each.key]))
                report((number + 1) / len(todo))
        return found


def grouped(rows: Iterable[Result], by: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    """Return the rows by what a function says of them, in the order in which it says so first.

    Args:
        rows: The rows.
        by: The function.
    """
    found: dict[Any, list[Result]] = {}
    for each in rows:
        found.setdefault(by(each), []).append(each)
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
