"""Code blocks of the first run, how-to pages, concepts and sketches run, and print what they say; that about devices as a script."""

import io
import logging
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from lightning_conv.callbacks.criteria import tracker

DOCS = Path(__file__).resolve().parents[2] / "docs"
HOW_TO = [DOCS / "first_run.md", *sorted((DOCS / "how_to").glob("*.md"))]
CONCEPTS = [page for page in sorted((DOCS / "concepts").glob("*.md")) if "```python" in page.read_text()]
PAGES = [*HOW_TO, *CONCEPTS, DOCS / "sketches.md"]
SCRIPTS = {"ddp.md", "sharded.md"}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = "# > "


def said(block: str) -> list[str]:
    """Return what a block says that it prints."""
    return [line.removeprefix(PRINTED) for line in block.splitlines() if line.startswith(PRINTED)]


def test_every_how_to_has_a_block_that_runs():
    assert len(HOW_TO) > 7
    assert len(CONCEPTS) >= 3
    assert [page.name for page in HOW_TO if not BLOCK.findall(page.read_text())] == []


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in SCRIPTS], ids=lambda page: page.stem)
def test_the_blocks_print_what_they_say(page, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    monkeypatch.setattr(tracker, "_REGISTRY", dict(tracker._REGISTRY))  # a page may register a paper
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.findall(page.read_text()):
        with redirect_stdout(io.StringIO()) as printed:
            exec(block, names)
        lines = [line for line in printed.getvalue().splitlines() if line in said(block)]
        assert lines == said(block), block


@pytest.mark.docs
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_the_script_prints_what_it_says(name, tmp_path) -> None:
    (block,) = BLOCK.findall((DOCS / "how_to" / name).read_text())
    (tmp_path / "script.py").write_text(block)
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert said(block)
    assert set(said(block)) <= set(result.stdout.splitlines()), result.stdout
