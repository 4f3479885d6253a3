"""Papers know the base, the base knows no paper: nothing but the discovery imports `callbacks.criteria.papers`."""

import ast
from pathlib import Path

import pytest

from lightning_conv.callbacks.criteria import papers, registered_criteria

ROOT = Path(__file__).resolve().parents[3]
PAPERS = "lightning_conv.callbacks.criteria.papers"
DISCOVERY = "callbacks/criteria/__init__.py"
ROOMS = ("callbacks", "lightning_conv", "recipes")
SLUGS = {path.stem for path in Path(papers.__file__).parent.iterdir() if not path.stem.startswith("_")}


def imports(source: str) -> set[str]:
    """Every absolute name that a source imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def of_papers(names: set[str]) -> set[str]:
    return {name for name in names if name == PAPERS or name.startswith(f"{PAPERS}.")}


def test_the_base_imports_no_paper():
    base = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    base = [path for path in base if "callbacks/criteria/papers/" not in path.as_posix()]
    assert {"tracker.py", "run_record.py", "view.py", "kernel_stability.py"} <= {path.name for path in base}
    knowing = {path.relative_to(ROOT).as_posix() for path in base if of_papers(imports(path.read_text()))}
    assert knowing == {DISCOVERY}
    assert of_papers(imports((ROOT / DISCOVERY).read_text())) == {PAPERS}  # the package, and no paper in it


def test_a_paper_imports_no_other_paper():
    for path in sorted(Path(papers.__file__).parent.rglob("*.py")):
        own = path.relative_to(Path(papers.__file__).parent).parts[0].removesuffix(".py")
        others = {name for name in of_papers(imports(path.read_text())) if name.split(".")[4] != own}
        assert not others, path


def test_every_file_of_the_folder_registers_the_paper_of_its_name():
    assert set(registered_criteria()) >= SLUGS


@pytest.mark.parametrize(
    "line", [f"import {PAPERS}.du", "from lightning_conv.callbacks.criteria import papers", f"from {PAPERS} import du"]
)
def test_every_form_of_import_is_seen(line):
    assert of_papers(imports(f"def f():\n    {line}\n"))
