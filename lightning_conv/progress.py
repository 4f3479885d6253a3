"""A bar on standard error for work that takes long, and the reports that move it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report: TypeAlias = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""

LONG = 5.0
"""Predicted seconds from which on a bar is shown to people."""


def silent(share: float) -> None:
    """A report that nobody reads."""
    del share


def part(report: Report, start: float, share: float) -> Report:
    """The report of a part of the work, which begins at ``start`` and makes up ``share`` of it."""
    return lambda done: report(start + share * done)


def equal_parts(report: Report, count: int) -> Iterator[Report]:
    """The reports of ``count`` parts of the work, one after the other."""
    return (part(report, k / count, 1 / count) for k in range(count))


@contextmanager
def progress_bar(title: str, seconds: float, wanted: bool | Report | None) -> Iterator[Report]:
    """Show a bar while the block runs.

    Args:
        title: stands before the bar.
        seconds: predicted.
        wanted: None: on a terminal, if it takes ``LONG``. A report is used in the place of a bar.

    Yields:
        The report that moves the bar.
    """
    if callable(wanted):
        yield wanted
        return
    console = Console(stderr=True)
    if wanted is None:
        wanted = seconds >= LONG and console.is_terminal
    if not wanted:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=console)
    try:
        bar.start()
    except LiveError:  # another bar has the terminal, such as that of a training run
        yield silent
        return
    task = bar.add_task(title, total=1.0)
    try:
        yield lambda share: bar.update(task, completed=share)
    finally:
        bar.stop()
