"""No circle of files: no module imports itself through others, whether at the top, in a function or for types only."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of the house that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import name` needs the package itself unless every name is one of its modules.
            found |= names & modules | ({node.module} if names - modules else set())
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, its first member again at the end; empty: there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_circle_of_imports(house):
    modules = house.modules()
    graph = {name: imported(path, set(modules)) - {name} for name, path in modules.items()}
    found = circle(graph)
    assert not found, f"a circle of imports: {' -> '.join(found)}"


@pytest.mark.parametrize(
    "late",
    ["from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import x", "def f():\n    import a.b"],
    ids=["type-only", "in a function"],
)
def test_a_circle_would_be_found_and_named(late, tmp_path):
    (tmp_path / "b.py").write_text("from a import c\n")
    (tmp_path / "c.py").write_text(late + "\n")
    modules = {"a.b": tmp_path / "b.py", "a.c": tmp_path / "c.py"}
    graph = {name: imported(path, set(modules)) for name, path in modules.items()}
    assert circle(graph) in (["a.b", "a.c", "a.b"], ["a.c", "a.b", "a.c"])
