"""The outcome of an experiment: checks, tables and a figure, written as Markdown, JSON and PNG."""

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
from lightning_conv.reporting.json_values import json_values
from lightning_conv.reporting.markdown import markdown_table
from lightning_conv.theory.criterion import Criterion, Verdict

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """One inequality, and whether it was satisfied in this experiment."""

    claim: str  # in words and symbols
    source: str  # paper and theorem
    holds: bool
    seen: str  # the numbers behind it
    must: bool = True  # False: an observation; a theorem with "exists" or O(.) gives no bound for a given network

    @classmethod
    def of(
        cls,
        criterion: Criterion,
        where: str = "",
        *,
        verdicts: Sequence[Verdict] = ("consistent",),
        seen: str | None = None,
        must: bool = True,
    ) -> Check:
        """Turn a judged criterion into a check.

        Args:
            criterion: the judged inequality.
            where: the run that it is about, put before the claim.
            verdicts: verdicts with which the check counts as satisfied.
            seen: the numbers behind it; None: the reason of the criterion.
            must: whether the inequality has to be satisfied, see the attribute.
        """
        claim = f"{where}: {criterion.asks}" if where else criterion.asks
        told = criterion.reason if seen is None else seen
        return cls(claim, criterion.source, criterion.verdict in verdicts, told, must)

    @property
    def answer(self) -> str:
        """Outcome in a word: "yes", "NO" for a violation, "no (need not)" for an observation."""
        return "yes" if self.holds else "NO" if self.must else "no (need not)"


def with_verdict(criterion: Criterion) -> str:
    """Return the verdict of a criterion and its reason."""
    return f"{criterion.verdict}: {criterion.reason}"


def log_spaced(last: int, points: int) -> list[int]:
    """Return at most ``points`` steps from 0 to ``last``, evenly spaced on the logarithmic axis of step + 1."""
    return sorted({round((last + 1) ** (k / (points - 1))) - 1 for k in range(points)})


@dataclass(frozen=True)
class Report:
    """The outcome of one experiment."""

    name: str  # name of the experiment; the names of the written files begin with it
    title: str
    setting: str  # a description of the run in a few sentences
    checks: Sequence[Check]
    tables: Mapping[str, Sequence[Row]]  # caption -> rows, each with the same keys
    figure: Figure | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # further numbers for the JSON
    seconds: float = math.nan

    @property
    def violated(self) -> list[Check]:
        """The checks that must be satisfied and are not."""
        return [check for check in self.checks if check.must and not check.holds]

    def markdown(self, command: str) -> str:
        """Return the page as Markdown.

        Args:
            command: the command that produced the report.
        """
        machine = f"{processor()}, {torch.get_num_threads()} threads, torch {version('torch')}"
        made = f"Made by `{command}` on {date.today().isoformat()}, {machine}, in {self.seconds:.0f} s."
        answers = [(c.answer.replace("NO", "**NO**"), c.claim, c.seen, c.source) for c in self.checks]
        parts = [f"# {self.title}", made, self.setting.strip(), "## Checks"]
        parts.append(markdown_table(("holds", "claim", "seen", "source"), answers))
        for caption, rows in self.tables.items():
            parts += [f"## {caption}", _table(rows)]
        if self.figure is not None:
            parts.append(f"![{self.title}]({self.name}.png)")
        return "\n\n".join(parts) + "\n"

    def files(self, folder: Path) -> list[Path]:
        """Return the paths that ``write`` writes in a folder, the page first."""
        endings = ("md", "json", *(() if self.figure is None else ("png",)))
        return [folder / f"{self.name}.{ending}" for ending in endings]

    def write(self, folder: Path, command: str) -> Path:
        """Write NAME.md, NAME.json (null for what is not finite) and NAME.png, and return the path of the page."""
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / f"{self.name}.md"
        plain = {
            "name": self.name,
            "command": command,
            "date": date.today().isoformat(),
            "processor": processor(),
            "seconds": self.seconds,
            "checks": [asdict(check) for check in self.checks],
            "tables": self.tables,
            "data": self.data,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(json_values(plain), indent=1, allow_nan=False) + "\n")
        if self.figure is not None:
            self.figure.savefig(folder / f"{self.name}.png", dpi=110)
        page.write_text(self.markdown(command))
        return page


def _table(rows: Sequence[Row]) -> str:
    """Return a Markdown table with numbers to four digits."""
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    return markdown_table(columns, [[_said(row[name]) for name in columns] for row in rows])


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
