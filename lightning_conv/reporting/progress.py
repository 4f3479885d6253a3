"""Progress of long computations: a bar on standard error, or lines for logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_conv.arguments import described

Report: TypeAlias = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""

LONG = 5.0
"""Predicted duration in seconds from which a bar is shown on a terminal."""


def require_report(progress: object) -> None:
    """Refuse what does not say how progress is to be shown.

    Args:
        progress: the argument of this name.

    Raises:
        TypeError: it is neither a truth value, None nor a function.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(
            f"progress: {described(progress)}; need True, False, None or a function of the share that is done"
        )


def silent(share: float) -> None:
    """Do nothing with the reported share."""
    del share


def part(report: Report, start: float, share: float) -> Report:
    """Return a report for one part of the work, which begins at ``start`` and makes up ``share`` of the whole.

    The part's own share of 0 to 1 is mapped to ``start`` to ``start + share``.
    """
    return lambda done: report(start + share * done)


def equal_parts(report: Report, count: int) -> Iterator[Report]:
    """Yield the reports of ``count`` equal parts of the work, one after the other."""
    return (part(report, k / count, 1 / count) for k in range(count))


class Lines:
    """A report for logs, which writes a line at most after every ``step`` of the work and every ``pause`` seconds.

    Args:
        say: function that writes one line of text.
        title: beginning of each line.
        step: least share of the work between two lines.
        pause: least time between two lines, in seconds.
        predicts: whether the first line says how long the work is predicted to take.
    """

    def __init__(
        self, say: Callable[[str], None], title: str, step: float = 0.05, pause: float = 60.0, *, predicts: bool = False
    ) -> None:
        self._say, self._title, self._step, self._pause, self._predicts = say, title, step, pause, predicts
        self._began = self._last = time.monotonic()
        self._start: float | None = None  # the share that an earlier process had done
        self._said = 0.0

    def expect(self, seconds: float) -> None:
        """Write how long the work is predicted to take, if that is ``LONG`` or more."""
        if self._predicts and seconds >= LONG:
            self._say(f"{self._title}: about {said_duration(seconds)}")

    def __call__(self, share: float) -> None:
        """Write a line if enough work and time have passed since the last one."""
        now = time.monotonic()
        if self._start is None:
            self._start = self._said = share
        if share < self._said + self._step or now < self._last + self._pause:
            return
        gone = now - self._began
        left = gone * (1 - share) / max(share - self._start, 1e-9)
        self._said, self._last = share, now
        self._say(f"{self._title}: {100 * share:.0f} %, {said_duration(gone)} gone, about {said_duration(left)} to go")


def said_duration(seconds: float) -> str:
    """Return a duration in seconds, or from two minutes on in minutes.

    Example:
        >>> said_duration(7.3), said_duration(600.0)
        ('7 s', '10 minutes')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


@contextmanager
def progress_bar(title: str, seconds: float, wanted: bool | Report | None) -> Iterator[Report]:
    """Show a bar while the block runs.

    Args:
        title: text before the bar.
        seconds: predicted duration in seconds; it only decides whether a bar is shown if ``wanted`` is None.
        wanted: whether to show the bar; None: only on a terminal and if the prediction reaches ``LONG``. A report is
            used instead of a bar; ``Lines`` are told of the prediction.

    Raises:
        TypeError: see ``require_report``.

    Yields:
        The report, which moves the bar when it is called with the share that is done.
    """
    require_report(wanted)
    if callable(wanted):
        if isinstance(wanted, Lines):
            wanted.expect(seconds)
        yield wanted
        return
    console = Console(stderr=True)
    if wanted is None:
        wanted = seconds >= LONG and console.is_terminal
    if not wanted:
        yield silent
        return
    text = TextColumn("{task.description}", markup=False)  # as markup, "[h, 1]" would disappear from a title
    bar = Progress(text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    try:
        bar.start()
    except LiveError:  # another bar, such as that of a training run, uses the terminal
        yield silent
        return
    task = bar.add_task(title, total=1.0)
    try:
        yield lambda share: bar.update(task, completed=share)
    finally:
        bar.stop()
