"""The command `lightning-conv report`: the page of a run from its folder, or of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_conv.recipes.usage import PAGE, UsageError, UsageParser

if TYPE_CHECKING:
    from lightning_conv.reporting.page.run_record import RunRecord

COMPARED = "convergence_compare.html"

EXAMPLES = """\
examples:
  lightning-conv report runs/wide_fc/guarded_0
  lightning-conv report runs/wide_fc/guarded_0 runs/wide_fc/plain_0 --compare --out compared.html
"""


def parser() -> UsageParser:
    """Return the parser of the command."""
    made = UsageParser(
        "report",
        description="Write one HTML file about a run, which needs no network: findings in plain words, charts, criteria and settings.",
        epilog=EXAMPLES,
    )
    made.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help=f"the folder in which a run's logger (TensorBoard, CSV) or ConvergenceReport has written; its page is {PAGE} in this folder",
    )
    made.add_argument(
        "--compare", action="store_true", help=f"all runs on one page, side by side, {COMPARED} in the present folder"
    )
    made.add_argument("--out", "--output", metavar="FILE", help="where to write the page instead")
    return made


def report(words: Sequence[str]) -> list[Path]:
    """Write the page of each run, or one page of all of them, and say where.

    Args:
        words: The words of the command line after `report`.

    Returns:
        The files.

    Raises:
        UsageError: A folder has no run in it, a file cannot be written, or the words cannot be understood.
    """
    asked = parser().parse_args(list(words))
    folders = [Path(each) for each in asked.runs]
    if asked.out is not None and len(folders) > 1 and not asked.compare:
        raise UsageError(
            f"report: --out names one file, and there are {len(folders)} runs; add --compare for one page of all of them"
        )
    from lightning_conv.recipes.read_run import read_run
    from lightning_conv.reporting.page.html_page import compare_page, run_page

    runs = [read_run(folder) for folder in folders]
    if asked.compare:
        pages = {Path(asked.out or COMPARED): compare_page(_with_names(runs, folders))}
    else:
        pages = {
            Path(asked.out) if asked.out else folder / PAGE: run_page(run)
            for folder, run in zip(folders, runs, strict=True)
        }
    for path, page in pages.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page, "utf-8")
        except OSError as error:
            raise UsageError(
                f"report: {path} cannot be written ({error.strerror}); --out FILE writes it elsewhere"
            ) from error
        print(f"page: {path}")
    return list(pages)


def _with_names(runs: Sequence[RunRecord], folders: Sequence[Path]) -> list[RunRecord]:
    """Return the runs with short names that differ: what of their folders is not the same for all; a folder named twice is one run."""
    unique = {folder.resolve(): run for folder, run in zip(folders, runs, strict=True)}
    paths = [folder.parts for folder in unique]
    common = 0
    while all(len(each) > common + 1 and each[common] == paths[0][common] for each in paths):
        common += 1
    return [replace(run, name="/".join(folder.parts[common:])) for folder, run in unique.items()]
