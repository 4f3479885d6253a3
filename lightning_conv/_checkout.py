"""Lets `lightning_conv.callbacks` and `lightning_conv.recipes` be imported from a checkout.

The repository keeps three rooms side by side: `lightning_conv/`, `callbacks/` and `recipes/`. An installation maps the
last two under `lightning_conv`; a plain checkout on the import path does not. The finder below supplies exactly these
two names from the sibling folders. It comes before all others: an editable install of a second checkout would otherwise
lend its rooms to this one.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOMS = frozenset({"lightning_conv.callbacks", "lightning_conv.recipes"})


class RoomFinder(MetaPathFinder):
    """Finds the two sibling rooms; their submodules follow from the `__path__` of the room."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a room, or `None` for any other name."""
        if fullname not in ROOMS:
            return None
        folder = self.root / fullname.removeprefix("lightning_conv.")
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def install() -> None:
    """Register the finder, once and only in a checkout: `pyproject.toml` beside the package, no rooms inside it."""
    # The path is not resolved: a strict editable install links the files, and its link tree holds the rooms inside.
    package = Path(__file__).parent
    if not (package.parent / "pyproject.toml").is_file() or (package / "callbacks" / "__init__.py").exists():
        return
    if not any(isinstance(finder, RoomFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RoomFinder(package.parent))
