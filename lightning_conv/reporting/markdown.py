"""Markdown tables from data."""

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Format a table with a header row; characters that would break a cell are escaped.

    Args:
        columns: names of the columns.
        rows: the rows, with one cell per column.

    Raises:
        ValueError: a row has another number of cells.

    Example:
        >>> print(markdown_table(["n", "norm"], [["2", "|x|"]]))
        | n | norm |
        |---|---|
        | 2 | \|x\| |
    """
    lines = [_line(columns), "|" + "---|" * len(columns)]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"rows: {list(row)} has {len(row)} cells; need {len(columns)}, one for each of {', '.join(columns)}"
            )
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
