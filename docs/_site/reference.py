"""The directive `package`: all public names of a package with their first sentences, and the descriptions of those at home there."""

from __future__ import annotations

import ast
import inspect
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_origin

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from _site.docstrings import escaped
from _site.names import homes, is_described, names_of


def first_sentence(value: object) -> str:
    """Return the first paragraph of a docstring on one line; that of a value without one is its own text, if short."""
    text = inspect.getdoc(value) if is_described(value) else None
    return escaped(" ".join((text or "").split("\n\n")[0].split()))


def row(package: str, name: str) -> list[str]:
    """Return a row of the table of names, as reStructuredText."""
    value, home = getattr(import_module(package), name), homes()[f"{package}.{name}"]
    role = "mod" if isinstance(value, ModuleType) else "obj"
    return [f"   * - :py:{role}:`{name} <{home}>`", f"     - {first_sentence(value) or said_of_data(package, name)}"]


def description(package: str, name: str) -> list[str]:
    """Return the directive of autodoc that describes a name, if this package is its home."""
    full = f"{package}.{name}"
    value = getattr(import_module(package), name)
    if homes()[full] != full or isinstance(value, ModuleType):
        return []
    if inspect.isclass(value):
        return ["", f".. autoclass:: {full}", "   :members:", "   :show-inheritance:"]
    if is_described(value):
        return ["", f".. autofunction:: {full}"]
    return ["", f".. py:data:: {name}", f"   :module: {package}", "", f"   {said_of_data(package, name)}"]


def said_of_data(package: str, name: str) -> str:
    """Return the string below the assignment of a constant or of an alias of a type, and what the alias stands for."""
    value, found = getattr(import_module(package), name), ""
    for module in [each for key, each in sys.modules.items() if key.startswith("lightning_conv")]:
        if vars(module).get(name) is value and module.__file__ is not None:
            for one, two in pairwise(ast.parse(Path(module.__file__).read_text()).body):
                assigned = isinstance(one, ast.Assign | ast.AnnAssign) and name in ast.unparse(one).split("=")[0]
                if assigned and isinstance(two, ast.Expr) and isinstance(two.value, ast.Constant):
                    found = escaped(" ".join(str(two.value.value).split())) + " "
    is_short = isinstance(value, str) or get_origin(value) is not None
    return found + (f"``{value}``".replace("typing.", "").replace("collections.abc.", "") if is_short else "")


def page(package: str) -> list[str]:
    """Return the text of the directive: the package's docstring, the table, the descriptions."""
    names = sorted(names_of(package), key=str.lower)
    rows = [line for name in names for line in row(package, name)]
    table = ["", ".. list-table::", "   :widths: 30 70", "", *rows] if rows else []
    described = [line for name in names for line in description(package, name)]
    return [f".. automodule:: {package}", "   :no-members:", *table, *described]


class Package(SphinxDirective):
    """Expands to the reference of the package that is its argument."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """Parse the generated text where the directive stands."""
        name = self.arguments[0]
        lines = StringList([*page(name), ""], source=f"the reference of {name}")
        holder = nodes.Element()
        self.state.nested_parse(lines, 0, holder)
        return list(holder.children)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive with Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("package", Package)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
