"""`lightning-conv lab`: run an experiment, print its checks, write its page; exit code 1 if an inequality fails."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser
from rich.console import Console
from typing_extensions import override

from lightning_conv.recipes.lab import EXPERIMENTS, OUT, experiment, resolve
from lightning_conv.recipes.lab.report import Report
from lightning_conv.recipes.mistakes import in_one_line
from lightning_conv.recipes.small import is_small
from lightning_conv.recipes.usage import UsageError
from lightning_conv.reporting.terminal import console, print_paths, print_table


class LabParser(ArgumentParser):
    """Parser that reports a mistake in one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as an exception, which the command reports.

        Raises:
            UsageError: always.
        """
        options = [action.dest for action in self._actions if action.option_strings]
        raise UsageError(f"{self.prog.removeprefix('lightning-conv ')}: {in_one_line(message, options)}") from ex


def run_lab(name: str, args: Sequence[str]) -> int:
    """Run one experiment.

    Args:
        name: name of the experiment.
        args: settings of the experiment and `--out FOLDER`, as words of the command line.

    Returns:
        0, or 1 if an inequality that must hold is violated.

    Raises:
        ValueError: there is no such experiment.
        UsageError: a setting does not exist or is impossible.
    """
    slug, words = resolve(name, args)
    run = experiment(slug)
    parser = LabParser(prog=f"lightning-conv lab {slug}", description=EXPERIMENTS[slug], allow_abbrev=False)
    parser.add_argument("--out", "--output", type=str, default=str(OUT), help=f"folder of the page (default {OUT})")
    flags = {setting for setting, kind in get_type_hints(run).items() if kind is bool}
    parser.add_function_arguments(run, skip={*flags})
    for flag in sorted(flags):  # `--flag` alone means true
        parser.add_argument(
            f"--{flag}", action=ActionYesNo, nargs="?", default=inspect.signature(run).parameters[flag].default
        )
    if is_small():
        parser.set_defaults(sys.modules[run.__module__].SMALL)
    settings = parser.instantiate(parser.parse_args(words)).as_dict()
    folder = Path(settings.pop("out"))
    start = time.perf_counter()
    try:
        report = run(**settings)
    except ValueError as error:
        if re.split(r"\W", str(error))[0] not in inspect.signature(run).parameters:  # not about a setting: a bug
            raise
        raise UsageError(f"lab {name}: {' '.join(str(error).split())}") from error
    report = replace(report, seconds=time.perf_counter() - start)
    page = report.write(folder, shlex.join(["lightning-conv", "lab", name, *args]))
    shown = console()
    show(report, shown)
    print_paths(shown, ["", f"written: {', '.join(map(str, report.files(page.parent)))}"])
    return 1 if report.violated else 0


def show(report: Report, to: Console) -> None:
    """Print the checks of a report as a table."""
    rows = [(check.answer, check.claim, check.seen) for check in report.checks]
    print_table(to, ("holds", "claim", "seen"), rows, title=report.title)
