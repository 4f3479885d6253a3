"""What is written to a terminal: its width and colours, one form for all tables, and texts that leave progress bars whole."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 100
"""Columns of what goes into a file or a pipe."""

NARROWEST = 30


def has_color(stream: object) -> bool:
    """Return whether a stream takes colours: it is a terminal, and ``NO_COLOR`` is not set to anything but the empty string.

    Args:
        stream: Such as the standard output.
    """
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def is_terminal(stream: object) -> bool:
    """Return whether a stream is a terminal; a closed one is none.

    Args:
        stream: Anything with ``isatty``.
    """
    try:
        return bool(getattr(stream, "isatty", lambda: False)())
    except ValueError:
        return False


def console(stream: TextIO | None = None, width: int | None = None) -> Console:
    """Return a console: of the terminal's own width and colours, and for files and pipes plain and ``LOG_WIDTH`` wide.

    Args:
        stream: Where it writes; None: the standard output.
        width: Columns; None: as above.
    """
    stream = sys.stdout if stream is None else stream
    if width is None and not is_terminal(stream) and "COLUMNS" not in os.environ:
        width = LOG_WIDTH
    width = None if width is None else max(width, NARROWEST)
    return Console(file=stream, width=width, no_color=not has_color(stream), highlight=False, emoji=False)


def print_table(
    to: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", keep: Sequence[int] = (0,)
) -> None:
    """Print a table in the one form that all commands have; texts are printed as they are, without markup.

    Args:
        to: The console.
        columns: The headings; all of them empty: there is no line of headings.
        rows: The cells.
        title: Above it.
        keep: Numbers of the columns that are not broken into lines, if the table is wide enough for that.
    """
    headed = any(columns)
    # Lines of letters for a terminal whose encoding has no others.
    ascii_only = not (getattr(to.file, "encoding", None) or "utf-8").lower().startswith("utf")
    made = Table(
        title=Text(title) if title else None,
        title_justify="left",
        show_header=headed,
        box=(box.ASCII if ascii_only else box.ROUNDED) if to.is_terminal else box.ASCII2,
    )
    for number, column in enumerate(columns):
        made.add_column(Text(column), no_wrap=number in keep and to.width >= 60, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    to.print(made)


def print_paths(to: Console, lines: Sequence[str]) -> None:
    """Print lines with paths, which are not broken: one that is cannot be copied.

    Args:
        to: The console.
        lines: The lines.
    """
    for line in lines:
        to.print(Text(line), soft_wrap=True)


def path_from_here(path: str) -> str:
    """Return a path as it can be pasted into a command: from the working directory if it is in it, and as it is otherwise.

    Args:
        path: Of a file or folder; addresses such as ``s3://bucket/run`` stay as they are.
    """
    place, here = Path(path).absolute(), Path.cwd()
    return str(place.relative_to(here)) if "://" not in path and place.is_relative_to(here) else path


def width_of(stream: object, most: int = LOG_WIDTH) -> int:
    """Return the columns of a terminal, and of anything else ``most``.

    Args:
        stream: Such as the standard output.
        most: Columns at most: longer lines are hard to read.
    """
    if not is_terminal(stream):
        return most
    return max(min(shutil.get_terminal_size((most, 24)).columns, most), NARROWEST)


@contextmanager
def bars_aside(stream: object) -> Iterator[None]:
    """Take the bars of tqdm off the terminal while the block writes, and draw them again below what it has written.

    Args:
        stream: Where it writes.
    """
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # without it there are no such bars
    with nullcontext() if tqdm is None else tqdm.external_write_mode(file=stream):
        yield


def log_block(logger: logging.Logger, level: int, render: Callable[[TextIO | None], str]) -> None:
    """Log a text of several lines, in colours where a handler writes to a terminal and plain for all others, such as log files.

    The line of a bar of tqdm, and a live display of rich, stay whole.

    Args:
        logger: The logger.
        level: Such as ``logging.INFO``.
        render: Returns the text for the stream of a handler; None: the handler has none.
    """
    if not logger.isEnabledFor(level):
        return
    for handler in _handlers(logger):
        stream = getattr(handler, "stream", None)
        record = logger.makeRecord(logger.name, level, __file__, 0, "%s", (render(stream),), None)
        if level < handler.level or not logger.filter(record):
            continue
        if isinstance(sys.stderr, FileProxy) and stream is sys.stderr.rich_proxied_file and handler.filter(record):
            sys.stderr.write(handler.format(record) + "\n")  # above the live display
            continue
        with bars_aside(stream) if is_terminal(stream) else nullcontext():
            handler.handle(record)


def _handlers(logger: logging.Logger) -> list[logging.Handler]:
    """Return the handlers that get what a logger says."""
    place: logging.Logger | None = logger
    found: list[logging.Handler] = []
    while place is not None:
        found += place.handlers
        place = place.parent if place.propagate else None
    return found or ([logging.lastResort] if logging.lastResort else [])


@contextmanager
def warnings_shown_as(text: str) -> Iterator[None]:
    """Show a warning of the block as a text where it goes to a terminal; whoever records or logs warnings gets it as it is.

    Args:
        text: What is shown in place of the line with the path of the code.
    """
    stream, before = sys.stderr, warnings.formatwarning
    shown = getattr(warnings.showwarning, "__module__", "").endswith("warnings")  # otherwise someone logs them
    if not (is_terminal(stream) and shown):
        yield
        return
    warnings.formatwarning = lambda *_, **__: f"{text}\n"
    try:
        with nullcontext() if isinstance(stream, FileProxy) else bars_aside(stream):
            yield
    finally:
        warnings.formatwarning = before
