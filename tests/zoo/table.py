"""Judge the zoo: python tests/zoo/table.py [--page] [NAME ...]; --page writes the table into docs/compatibility.md."""

import logging
import os
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import torch
from case import Case
from cases import CASES
from zoo_judge import Kind, Outcome, judge

from lightning_conv.reporting.markdown import markdown_table

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- begin: python tests/zoo/table.py --page -->", "<!-- end -->"
SHOWN = 240
"""Characters of a sentence in the table."""

Judged = Sequence[tuple[Case, Outcome]]


def versions() -> str:
    found = [
        platform.machine(),
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} thread",
        f"Python {platform.python_version()}",
    ]
    for name in ("torch", "lightning", "torchvision", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def by_family(judged: Judged) -> str:
    families = sorted({family for case, _ in judged for family in case.families})
    kinds = [kind for kind in get_args(Kind) if any(outcome.kind == kind for _, outcome in judged)]
    rows = [
        (family, *(str(counts[kind] or "") for kind in kinds))
        for family in families
        for counts in [Counter(outcome.kind for case, outcome in judged if family in case.families)]
    ]
    total = Counter(outcome.kind for _, outcome in judged)
    return markdown_table(("family", *kinds), [*rows, ("**all cases**", *(f"**{total[kind]}**" for kind in kinds))])


def by_case(judged: Judged) -> str:
    rows = [
        (f"`{case.name}`", case.about, outcome.kind, f"{outcome.seconds_more:.1f}", shortened(outcome.sentence))
        for case, outcome in judged
    ]
    return markdown_table(("case", "what it is", "outcome", "seconds more", "sentence"), rows)


def shortened(sentence: str) -> str:
    cut = sentence if len(sentence) <= SHOWN else sentence[: SHOWN - 4] + " ..."
    return cut.replace("<", "&lt;")


def page(judged: Judged) -> str:
    """Return the page with its table made anew."""
    before, rest = PAGE.read_text().split(BEGIN)
    made = f"Made on {date.today()}: {versions()}. {len(judged)} cases; one case may be in several families."
    return f"{before}{BEGIN}\n\n{made}\n\n{by_family(judged)}\n\n{by_case(judged)}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str]) -> None:
    """Judge the cases of these names, or all, one line for each."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names, judged = [each for each in arguments if each != "--page"], []
    for case in CASES:
        if not names or case.name in names:
            judged.append((case, outcome := judge(case)))
            late = "" if outcome.reaches(case.expected) else f" (to be: {case.expected})"
            print(f"{case.name:28} {outcome.kind}{late} {outcome.sentence[:SHOWN]}", flush=True)
    print(by_family(judged))
    if "--page" in arguments:
        PAGE.write_text(page(judged))


if __name__ == "__main__":
    main(sys.argv[1:])
