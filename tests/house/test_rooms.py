"""The direction of imports: recipes may use callbacks, callbacks may use the core, and never the other way round."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}

IMPORT_CORE = """
import importlib, sys
import lightning_conv
for name in lightning_conv.__all__:
    getattr(lightning_conv, name)
print(*sorted(sys.modules))
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sorted(sys.modules))
"""


def _room(module: str) -> str:
    for room in ("callbacks", "recipes"):
        if module == f"lightning_conv.{room}" or module.startswith(f"lightning_conv.{room}."):
            return room
    return "core"


def _imported(module: str, path: Path) -> set[str]:
    """Every name that a module imports, anywhere in it; relative ones resolved."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def _imports_of(house, room: str) -> dict[str, set[str]]:
    return {name: _imported(name, path) for name, path in house.modules().items() if _room(name) == room}


def test_core_never_imports_lightning_callbacks_or_recipes(house):
    for module, names in _imports_of(house, "core").items():
        assert not {name for name in names if name.split(".")[0] in LIGHTNING}, module
        assert not {name for name in names if _room(name) != "core"}, module


def test_callbacks_never_import_recipes(house):
    for module, names in _imports_of(house, "callbacks").items():
        assert not {name for name in names if _room(name) == "recipes"}, module


@pytest.fixture(scope="module")
def loaded(house):
    """What a process has loaded after it used every name of the face of the core, and after it imported the whole core."""
    core = [name for name in house.modules() if _room(name) == "core"]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_CORE, *core], cwd=house.root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    face, whole = (set(line.split()) for line in result.stdout.splitlines())
    assert face < whole
    return face, whole


@pytest.mark.slow
def test_importing_the_core_loads_no_lightning(loaded):
    _, whole = loaded
    assert not {name.split(".")[0] for name in whole} & LIGHTNING


@pytest.mark.slow
def test_the_names_of_the_face_of_the_core_load_no_torchmetrics(loaded):
    """It takes seconds; who wants metrics imports `lightning_conv.metrics`."""
    face, _ = loaded
    assert "lightning_conv.kernels.drift" in face
    assert not {"torchmetrics", "lightning_conv.metrics"} & face
