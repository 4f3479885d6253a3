"""The files of an audit of labels: ``labels.md``, ``labels.csv`` and, of images, ``labels.png``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lightning_conv.health.labels.suspicious_labels import LabelAudit
from lightning_conv.networks.inputs import Inputs
from lightning_conv.reporting.label_pictures import are_pictures, plot_labels

NAME = "labels"


def write_audit(
    folder: Path,
    audit: LabelAudit,
    *,
    lines: Sequence[str],
    inputs: Inputs | None = None,
    numbers: list[int] | None = None,
) -> list[Path]:
    """Write the table of the most suspicious labels, all judged labels, and pictures where the samples are images.

    Args:
        folder: where to write; it is made if it is not there.
        audit: the audit.
        lines: paragraphs above the table, in Markdown.
        inputs: the samples, in the order of the audit; None: no pictures.
        numbers: number of each sample in the training set; None: not known.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, rows = folder / f"{NAME}.md", folder / f"{NAME}.csv"
    parts = ["# Labels that the other samples contradict", *lines, audit.markdown(numbers=numbers)]
    written = [page, rows]
    if isinstance(inputs, Tensor) and are_pictures(inputs):
        picture = folder / f"{NAME}.png"
        plot_labels(inputs, audit, numbers=numbers).savefig(picture)
        parts.append(f"![The most suspicious samples]({picture.name})")
        written.append(picture)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    _write_rows(rows, audit, numbers)
    return written


def _write_rows(path: Path, audit: LabelAudit, numbers: list[int] | None) -> None:
    """Write all judged labels, the most suspicious one first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        of_set = [] if numbers is None else ["training_set"]
        ranks = [f"rank_{name}" for name in audit.baselines]
        writer.writerow(["rank", "sample", *of_set, "given", "suggested", "margin", *ranks])
        for each in audit.top(audit.samples):
            number = [] if numbers is None else [numbers[each.number]]
            places = [each.ranks[name] for name in audit.baselines]
            writer.writerow([each.rank, each.number, *number, each.given, each.suggested, each.margin, *places])
