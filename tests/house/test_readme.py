"""The code blocks of the pages run, top to bottom, as a reader would paste them."""

import pytest
from mktestdocs import check_md_file


@pytest.mark.docs
def test_python_blocks_of_the_readme_run(house, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a block may write runs/
    check_md_file(house.root / "README.md", memory=True)
