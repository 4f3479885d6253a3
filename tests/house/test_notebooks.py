"""The notebooks run, and no number in their text is without a cell that computes or asserts it."""

import logging
import re
import warnings
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])\d[\d,.]*\d|(?<![\w.])\d")


def cells(notebook: Path) -> list[str]:
    return CELL.findall(notebook.read_text())


def prose(notebook: Path) -> str:
    text = CELL.sub("", notebook.read_text().split("---\n", 2)[2])
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_there_are_three_notebooks_and_a_page_lists_them():
    assert len(NOTEBOOKS) == 3
    page = (FOLDER.parent / "README.md").read_text()
    assert all(f"(notebooks/{notebook.name})" in page for notebook in NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_number_in_the_text_stands_in_a_cell(notebook):
    known = set(NUMBER.findall("\n".join(cells(notebook))))
    assert [each for each in NUMBER.findall(prose(notebook)) if each not in known] == []


@pytest.mark.docs
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_run_and_their_assertions_are_true(notebook, tmp_path, monkeypatch):
    pytest.importorskip("IPython", reason='needs the extra "docs"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    code = "\n".join(cells(notebook))
    assert code.count("assert ") >= 3
    with warnings.catch_warnings():
        exec(compile(code, str(notebook), "exec"), {"__name__": "__main__"})
