"""``short_names``: the names of layers as they fit next to a figure."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 22
"""Characters of a layer's name that fit next to bars."""


CARD_LETTERS = 19
"""Those that fit into a card, beside two or three panels."""


def name_inches(names: Sequence[str], points: float) -> float:
    """Return the width of a margin with names.

    Args:
        names: What is written, in one line each.
        points: Size of the letters, which are taken as 0.6 of it wide.
    """
    return 0.12 + 0.6 * points / 72 * max((len(name) for name in names), default=0)


def short_names(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Return names as they fit next to a figure: without the modules that all of them are in, and with both ends of what is long.

    Numbers keep the name of the module that they are in.

    Args:
        names: Names of layers; an empty one is the model itself.
        longest: Characters that fit.

    Example:
        >>> short_names(["net.blocks.0.attention.projection", "net.blocks.11.attention.projection", "net.head"])
        ['blocks.0.a..projection', 'blocks.11...projection', 'head']
    """
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    if common and all(each[common:][0].isdigit() and len(each) == common + 1 for each in parts):
        common -= 1  # numbers alone are no names
    found = []
    for each in parts:
        name = ".".join(each[common:]) or "(the model)"
        half = longest // 2
        found.append(name if len(name) <= longest else f"{name[: half - 1]}..{name[1 - longest + half :]}")
    return found
