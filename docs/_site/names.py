"""The public names: what the packages list in `__all__`, and the package that each one is documented under."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"lightning_conv": "", "callbacks": "lightning_conv.", "recipes": "lightning_conv."}
"""The three folders of packages, and what precedes each name when it is installed."""


def _lists_names(path: Path) -> bool:
    """Return whether the file assigns to `__all__`."""
    assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    return any(isinstance(target, ast.Name) and target.id == "__all__" for node in assigned for target in node.targets)


def names_of(package: str) -> list[str]:
    """Return what a package lists in `__all__`; of a module without one, the public classes and functions that it defines."""
    module = import_module(package)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == package]
    return list(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


@cache
def packages() -> tuple[str, ...]:
    """Return the packages with an `__all__` and the modules that they list, those that users import from first.

    The order is by depth, then by name.
    """
    listing = {
        prefix + ".".join(path.parent.relative_to(ROOT).parts)
        for room, prefix in ROOMS.items()
        for path in (ROOT / room).rglob("__init__.py")
        if _lists_names(path)
    }
    values = [getattr(import_module(package), name) for package in listing for name in names_of(package)]
    listed = {value.__name__ for value in values if isinstance(value, ModuleType)}
    return tuple(sorted(listing | listed, key=lambda name: (name.count("."), name)))


def public_names() -> Iterator[tuple[str, str]]:
    """Yield every package with every name that it lists."""
    for package in packages():
        for name in names_of(package):
            yield package, name


def is_described(value: object) -> bool:
    """Return whether a value has a docstring of its own: classes and functions have, aliases of types and constants have not."""
    return inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, ModuleType)


@cache
def homes() -> dict[str, str]:
    """Return for every public name, as `package.name`, the one under which it is described.

    The same class or function can be listed by several packages; the first one of `packages` describes it.
    """
    first: dict[int, str] = {}
    result = {}
    for package, name in public_names():
        value, full = getattr(import_module(package), name), f"{package}.{name}"
        if isinstance(value, ModuleType):
            result[full] = value.__name__
        elif is_described(value):
            result[full] = first.setdefault(id(value), full)
        else:
            same = [home for home in result.values() if home.endswith(f".{name}") and _value(home) is value]
            result[full] = same[0] if same else full
    return result


def _value(full: str) -> object:
    """Return what a dotted name of a package stands for."""
    package, _, name = full.rpartition(".")
    return getattr(import_module(package), name, None)


@cache
def unique() -> dict[str, str]:
    """Return the classes and functions whose short name means one thing only, also among modules, each with its full name."""
    found: dict[str, set[str]] = {}
    modules = {part for package in packages() for part in package.split(".")}
    for full, home in homes().items():
        if full.rpartition(".")[2] not in modules:
            found.setdefault(full.rpartition(".")[2], set()).add(home)
    return {name: next(iter(places)) for name, places in found.items() if len(places) == 1}
