"""What an experiment found: checks, tables and a figure, written as Markdown, JSON and PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lightning_conv.recipes.machine import processor
from lightning_conv.reporting.markdown import markdown_table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """One inequality, and whether it held in this experiment."""

    claim: str  # in words and symbols
    source: str  # paper and theorem
    holds: bool
    seen: str  # the numbers behind it
    must: bool = True  # False: an observation; a theorem that says "exists" or O(.) promises nothing here


@dataclass(frozen=True)
class Report:
    """The outcome of one experiment."""

    name: str  # file name of what is written
    title: str
    setting: str  # what was run, in a few sentences
    checks: Sequence[Check]
    tables: Mapping[str, Sequence[Row]]  # caption -> rows, each with the same keys
    figure: Figure | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # further numbers for the JSON
    seconds: float = math.nan

    @property
    def violated(self) -> list[Check]:
        """The checks that must hold and do not."""
        return [check for check in self.checks if check.must and not check.holds]

    def markdown(self, command: str) -> str:
        """The page.

        Args:
            command: that made it.
        """
        machine = f"{processor()}, {torch.get_num_threads()} threads, torch {version('torch')}"
        lines = [
            f"# {self.title}", "", f"Made by `{command}` on {date.today().isoformat()}, {machine}, in {self.seconds:.0f} s.", "",
            self.setting.strip(), "", "## Checks", "",
            markdown_table(("holds", "claim", "seen", "source"), [_checked(check) for check in self.checks]),
        ]  # fmt: skip
        for caption, rows in self.tables.items():
            lines += ["", f"## {caption}", "", _table(rows)]
        if self.figure is not None:
            lines += ["", f"![{self.title}]({self.name}.png)"]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, command: str) -> Path:
        """Write NAME.md, NAME.json (null for what is not a finite number) and NAME.png; returns the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / f"{self.name}.md"
        plain = {
            "name": self.name, "command": command, "date": date.today().isoformat(), "processor": processor(),
            "seconds": self.seconds, "checks": [asdict(check) for check in self.checks],
            "tables": {caption: [dict(row) for row in rows] for caption, rows in self.tables.items()}, "data": dict(self.data),
        }  # fmt: skip
        (folder / f"{self.name}.json").write_text(json.dumps(_finite(plain), indent=1, allow_nan=False) + "\n")
        if self.figure is not None:
            self.figure.savefig(folder / f"{self.name}.png", dpi=110)
        page.write_text(self.markdown(command))
        return page


def _checked(check: Check) -> tuple[str, str, str, str]:
    holds = "yes" if check.holds else "**NO**" if check.must else "no (need not)"
    return holds, check.claim, check.seen, check.source


def _table(rows: Sequence[Row]) -> str:
    """Numbers to four digits."""
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    return markdown_table(columns, [[_said(row[name]) for name in columns] for row in rows])


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """The same in JSON's types; what is not a finite number is None, as JSON knows neither infinity nor NaN.

    Raises:
        TypeError: it is nothing that has numbers.
    """
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
