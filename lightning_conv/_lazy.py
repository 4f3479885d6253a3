"""Public names of a package that are imported on first use (PEP 562), so that importing the package costs nothing.

A package states its names once, as ordinary imports that only type checkers, editors and the tests of the house read::

    __all__ = ["Drift", "kernel_drift"]

    if TYPE_CHECKING:
        from lightning_conv.kernels.drift import Drift, kernel_drift
    else:
        __getattr__, __dir__ = lazy(__name__)

The imports are parsed when the first name is asked for. ``lazy_loader`` of the Scientific Python project does the same with a stub file
beside the package; the stub would have to be shipped, and hides the package's real file from type checkers and from the tests that read
imports. The branch keeps type checkers from seeing ``__getattr__``, after which they would accept any name.
"""

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the functions ``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    A submodule is an attribute, too: after ``import lightning_conv``, ``lightning_conv.theory`` is there.

    Args:
        package: name of the package; its file has the imports below ``if TYPE_CHECKING:``.

    Returns:
        The two functions.
    """
    module = sys.modules[package]

    @cache
    def homes() -> dict[str, tuple[str, str]]:
        return imports_for_types(source_of(package))

    def get(name: str) -> Any:
        if name.startswith("__"):  # asked by doctest, inspect, pickle and others of every module
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in homes():
            home, original = homes()[name]
            value = getattr(__import__(home, fromlist=[original]), original)  # as `from home import original` does
        elif find_spec(f"{package}.{name}") is not None:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *module.__all__})

    return get, names


def source_of(package: str) -> str:
    """Return the source of a package's file.

    Args:
        package: name of an imported package.

    Raises:
        ImportError: only its compiled file is there.
    """
    spec = sys.modules[package].__spec__
    source = None if spec is None else cast(Any, spec.loader).get_source(package)
    if source is None:
        raise ImportError(
            f"{package}: its names are read from its source, __init__.py, which this installation does not have"
        )
    return cast(str, source)


def imports_for_types(source: str) -> dict[str, tuple[str, str]]:
    """Read the imports below ``if TYPE_CHECKING:``.

    Args:
        source: source of a module, with absolute imports.

    Returns:
        The module and the name there, by the name in the source. A module that is imported by ``from package import module`` is a name
        of its package.
    """
    blocks = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    found = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.asname or alias.name: (cast(str, node.module), alias.name) for node in found for alias in node.names}
