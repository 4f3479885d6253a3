"""Papers know the base, the base knows no paper: nothing of the core outside `theory/papers` imports a paper."""

import ast
from pathlib import Path

import pytest

PAPERS = "lightning_conv.theory.papers"
FACE = "lightning_conv.theory"
"""The package's own `__init__` names the papers for users."""


def _imported(path: Path) -> set[str]:
    """Every absolute name that a file imports, inside functions and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides what is imported"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _is_paper(name: str) -> bool:
    return name == PAPERS or name.startswith(f"{PAPERS}.")


def _base(house) -> dict[str, Path]:
    """The modules of the core that are neither a paper nor the face that names them."""
    rooms = ("lightning_conv.callbacks", "lightning_conv.recipes")
    outside = {name: path for name, path in house.modules().items() if not _is_paper(name) and name != FACE}
    return {name: path for name, path in outside.items() if not name.startswith(rooms)}


def test_no_module_of_the_base_imports_a_paper(house):
    base = _base(house)
    assert {"lightning_conv.theory.criterion", "lightning_conv.losses.objective"} <= set(base)
    for module, path in base.items():
        assert not {name for name in _imported(path) if _is_paper(name)}, module


@pytest.mark.parametrize("line", ["import lightning_conv.theory.papers.du", "from lightning_conv.theory import papers"])
def test_every_form_of_import_is_seen(tmp_path, line):
    path = tmp_path / "module.py"
    path.write_text(f"def f():\n    {line}\n")
    assert any(_is_paper(name) for name in _imported(path))
