"""`lightning-conv lab`: run an experiment, print its checks, write its page; exit code 1 if what must hold does not."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_conv.recipes.lab import EXPERIMENTS, experiment
from lightning_conv.recipes.lab.report import Report

OUT = Path("runs") / "lab"


def overview() -> str:
    """The experiments, a line each."""
    width = max((len(name) for name in EXPERIMENTS), default=0)
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in sorted(EXPERIMENTS.items())]
    return "usage: lightning-conv lab NAME [--out FOLDER] [settings]\n\n" + "\n".join(lines) + "\n"


def run_lab(name: str, args: Sequence[str]) -> int:
    """Run one experiment.

    Args:
        name: of ``EXPERIMENTS``.
        args: its settings as words of a command line, and --out.

    Returns:
        0, or 1 if an inequality that must hold is violated.
    """
    run = experiment(name)
    parser = ArgumentParser(prog=f"lightning-conv lab {name}", description=EXPERIMENTS[name][1], allow_abbrev=False)
    parser.add_argument("--out", type=str, default=str(OUT), help=f"folder of the page (default {OUT})")
    parser.add_function_arguments(run)
    settings = parser.instantiate(parser.parse_args(_said_flags(run, args))).as_dict()
    folder = Path(settings.pop("out"))
    start = time.perf_counter()
    report = run(**settings)
    report = replace(report, seconds=time.perf_counter() - start)
    page = report.write(folder, shlex.join(["lightning-conv", "lab", name, *args]))
    show(report, Console())
    print(f"\nwritten: {page}")
    return 1 if report.violated else 0


def _said_flags(run: Callable[..., Report], args: Sequence[str]) -> list[str]:
    """`--flag` alone, of a setting that is a bool, as `--flag true`."""
    flags = {f"--{name}" for name, kind in get_type_hints(run).items() if kind is bool}
    words: list[str] = []
    for word, following in zip(args, [*args[1:], "--"], strict=True):
        words.append(word)
        if word in flags and following.startswith("--"):
            words.append("true")
    return words


def show(report: Report, console: Console) -> None:
    """Print the checks."""
    table = Table(title=report.title)
    for column in ("holds", "claim", "seen"):
        table.add_column(column)
    for check in report.checks:
        holds = "yes" if check.holds else "NO" if check.must else "no (need not)"
        table.add_row(holds, escape(check.claim), escape(check.seen))
    console.print(table)
