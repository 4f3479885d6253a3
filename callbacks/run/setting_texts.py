"""``texts_of``: settings as short texts, without those that are secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_conv.callbacks.run.guarded import attempted

LONGEST = 300
"""Characters of a value that are kept."""

MOST = 200
"""Settings of a group that are kept."""

SECRET = re.compile(r"(^|[_.\-])(passw(or)?d|secret|token|api_?key|access_?key|credentials?)$", re.IGNORECASE)
"""Names of settings whose values are not written."""

HIDDEN = "(not shown)"


def texts_of(values: Mapping[Any, Any]) -> dict[str, str]:
    """Return settings as texts, cut where they are long.

    Args:
        values: The settings by name.
    """
    found: dict[str, str] = {}
    for name, value in list(values.items())[:MOST]:
        with attempted(Exception):  # how a value is printed is the user's code
            text = HIDDEN if SECRET.search(str(name)) else " ".join(str(value).split())
            found[str(name)] = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return found
