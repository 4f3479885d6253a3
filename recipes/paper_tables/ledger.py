"""The data of the tables: completely described runs, and a JSON file that keeps the finished ones."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_conv.recipes.machine import processor

BEFORE = {"method": "auto", "step_rule": "base", "cache_features": False}
"""Settings that did not exist when the first cells were written, with the values that were in use then."""

SAME_TRAINING = ("cache_features",)
"""Settings that change a run by rounding only; they are no part of the identity of a cell."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run, described by everything that decides its outcome; the result of an equal one can be reused."""

    data: str  # "digits", or a torchvision data set
    n: int  # training samples
    n_test: int | None  # test samples; None: the whole split
    recipe: str
    settings: dict[str, Any]  # all settings of the model
    changed: dict[str, Any]  # those that differ from the packaged recipe's
    batch_size: int
    epochs: int
    augment: bool
    seed: int  # of the weights, the split, the order of the batches and the augmentation
    guard: bool

    @property
    def title(self) -> str:
        """Name of the run in a progress line."""
        augmented = ", augmented" if self.augment else ""
        return f"{self.data} {self.recipe}{augmented}, seed {self.seed}, {'guarded' if self.guard else 'base'}"


@dataclass
class Ledger:
    """Finished cells with their results, and the commands that ran them.

    Every entry of `cells` is `{"cell": Cell as a dict, "run": index into runs, "result": dict}`.
    """

    path: Path
    runs: list[dict[str, Any]] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    _run: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read a ledger; a file that does not exist counts as an empty ledger.

        Args:
            path: path of the JSON file.

        Returns:
            The ledger.

        Raises:
            ValueError: if the file holds something else.
        """
        if not path.exists():
            return cls(path)
        try:
            stored = json.loads(path.read_text())
            cells = [entry | {"cell": _completed(entry["cell"])} for entry in stored["cells"]]
            return cls(path, list(stored["runs"]), cells)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"out: {path} holds no results of this command ({type(error).__name__}: {error}); move it away, or name another folder"
            ) from error

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the result of an equal cell, see `identity`; None if there is none."""
        wanted = identity(_plain(cell))
        found: list[dict[str, Any]] = [entry["result"] for entry in self.cells if identity(entry["cell"]) == wanted]
        return found[0] if found else None

    def begin(self, words: Sequence[str]) -> None:
        """Record the command that runs the next cells, and the machine; it is kept with the first of them."""
        self._run = {
            "command": shlex.join(["lightning-conv", "tables", *words]),
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "machine": machine(),
            "versions": {name: version(name) for name in ("lightning-conv", "torch", "torchvision", "lightning")},
            "python": platform.python_version(),
        }

    def keep(self, cell: Cell, result: dict[str, Any]) -> None:
        """Add a finished cell and write the file atomically; entries that another command added meanwhile are kept."""
        current = Ledger.read(self.path)
        self.runs, self.cells = current.runs, current.cells
        if self._run not in self.runs:
            self.runs.append(self._run)
        self.cells.append({"cell": _plain(cell), "run": self.runs.index(self._run), "result": result})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"runs": self.runs, "cells": self.cells}, indent=1) + "\n")
        os.replace(unfinished, self.path)


def identity(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a cell that determine the result up to rounding: all but the settings in `SAME_TRAINING`.

    Args:
        cell: cell as a dict.
    """
    cell = _completed(cell)
    parts = {
        part: {name: value for name, value in cell[part].items() if name not in SAME_TRAINING}
        for part in ("settings", "changed")
        if part in cell
    }
    return cell | parts


def _completed(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the cell with the settings that did not exist when it was run."""
    if "settings" not in cell:
        return cell
    missing = {name: value for name, value in BEFORE.items() if name not in cell["settings"]}
    return cell | {"settings": cell["settings"] | missing}


def machine() -> str:
    """Return the processor and the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores"


def _plain(cell: Cell) -> dict[str, Any]:
    """Return the cell as a dict, as it is after a round trip through JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(cell)))
    return plain
