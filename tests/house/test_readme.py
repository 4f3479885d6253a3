"""The code blocks of the pages run, top to bottom, as a reader would paste them."""

import io
import logging
import re
from contextlib import redirect_stdout

import pytest
from mktestdocs import check_md_file

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = "# > "


@pytest.mark.docs
def test_python_blocks_of_the_readme_run(house, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a block may write runs/
    check_md_file(house.root / "README.md", memory=True)


@pytest.mark.docs
def test_python_blocks_of_the_page_about_what_it_does_run(house, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_md_file(house.root / "docs" / "tour.md", memory=True)


@pytest.mark.docs
def test_python_blocks_of_the_page_about_health_run(house, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check_md_file(house.root / "docs" / "health.md", memory=True)


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_blocks_about_modules_print_what_they_say(house, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = BLOCK.findall((house.root / "docs" / "my_module.md").read_text())
    assert len(blocks) > 20
    for block in blocks:
        said = [line.removeprefix(PRINTED) for line in block.splitlines() if line.startswith(PRINTED)]
        with redirect_stdout(io.StringIO()) as printed:
            exec(block, names)
        assert printed.getvalue().splitlines() == said, block
