"""Compare two folders of results number by number: pages of the laboratory, the paper tables, and tables that a command printed.

    python benchmarks/compare_results.py BEFORE AFTER

Every `*.json` of either folder is compared exactly, by its canonical name: former names of experiments count as the present ones. Left out
is what differs from run to run: name, command, date, seconds, processor and machine. Of a `*.log` in both folders the lines of its tables
are compared, without times and paths. The exit code is 1 if anything differs, or if a JSON file is in one folder only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_conv.recipes.lab import resolve

IGNORED = {"name", "command", "date", "seconds", "processor", "machine", "versions", "python"}
SHOWN = 5
"""Differences that are printed per file."""


def canonical(path: Path) -> str:
    """Return the name under which a file is compared."""
    try:
        return resolve(path.stem)[0] + path.suffix
    except ValueError:
        return path.name


def content(path: Path) -> Any:
    """Return what is compared of a file: JSON without what differs from run to run, or the lines of printed tables."""
    if path.suffix == ".json":
        return _lasting(json.loads(path.read_text()))
    rows = [line for line in path.read_text().splitlines() if line.startswith("│") or line.endswith("points")]
    return [re.sub(r"\s+", " ", row) for row in rows if not re.search(r"time|logs", row)]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if key not in IGNORED}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield the places at which two values differ, with both values.

    Args:
        before: of the first folder.
        after: of the second one.
        place: of both in their file.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in before or key not in after:
                yield f"{place}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{place}/{key}")
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{place}: {len(before)} entries, then {len(after)}"
        for number, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from differences(old, new, f"{place}[{number}]")
    elif type(before) is not type(after) or before != after:
        yield f"{place}: {before!r}, then {after!r}"


def compare(before: Path, after: Path) -> int:
    """Print one line per file, and the first differences; return the number of files that differ.

    Args:
        before: folder of the earlier results.
        after: folder of the later ones.
    """
    folders = [
        {canonical(path): path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".log")}
        for folder in (before, after)
    ]
    differing = 0
    for name in sorted(folders[0].keys() | folders[1].keys()):
        pair = [folder.get(name) for folder in folders]
        if None in pair and name.endswith(".log"):
            continue
        if pair[0] is None or pair[1] is None:
            found = [f"only {'after' if pair[0] is None else 'before'}"]
        else:
            found = list(differences(content(pair[0]), content(pair[1])))
        print(f"{name}: {'equal' if not found else f'{len(found)} differences'}")
        for line in found[:SHOWN]:
            print(f"  {line}")
        differing += bool(found)
    return differing


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    return int(compare(options.before, options.after) > 0)


if __name__ == "__main__":
    sys.exit(main())
