"""A bar on standard error for work that takes long, and the reports that move it."""

from __future__ import annotations

import time
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


class Lines:
    """A report for logs: a line after every so many per cent, and no more than one in so many seconds.

    Args:
        say: takes a line.
        title: its beginning.
        step: share of the work between two lines.
        pause: seconds between two lines, at least.
    """

    def __init__(self, say: Callable[[str], None], title: str, step: float = 0.05, pause: float = 60.0) -> None:
        self._say, self._title, self._step, self._pause = say, title, step, pause
        self._began = self._last = time.monotonic()
        self._start: float | None = None  # what an earlier process had done
        self._said = 0.0

    def __call__(self, share: float) -> None:
        """Say how far it is, if it is time."""
        now = time.monotonic()
        if self._start is None:
            self._start = self._said = share
        if share < self._said + self._step or now < self._last + self._pause:
            return
        gone = now - self._began
        left = gone * (1 - share) / max(share - self._start, 1e-9)
        self._said, self._last = share, now
        self._say(f"{self._title}: {100 * share:.0f} %, {gone / 60:.0f} minutes gone, about {left / 60:.0f} to go")


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
