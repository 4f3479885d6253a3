"""The scripts of docs/examples run alone, say what their page says, and write the page of the run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
ROW = re.compile(r"^\| \[`(\w+\.py)`\]\((\w+\.py)\) \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
NUMBER = re.compile(r"\d[\d,.]*(?:e[-+]?\d+)?")


def rows() -> dict[str, str]:
    """Return the sentences that the page quotes of each script."""
    return {name: said.strip() for name, _, said in ROW.findall((FOLDER / "README.md").read_text())}


def shape(sentence: str) -> str:
    """Return a sentence with a sign in place of each number, which another machine may round otherwise."""
    return NUMBER.sub("#", " ".join(sentence.split()))


def test_there_are_six_scripts_and_the_page_has_a_row_for_each():
    assert len(SCRIPTS) >= 6
    assert sorted(rows()) == [script.name for script in SCRIPTS]
    assert all(one == other for one, other, _ in ROW.findall((FOLDER / "README.md").read_text()))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_short_says_what_is_seen_and_marks_one_line(script):
    text = script.read_text()
    assert len(text.splitlines()) < 150
    assert "What you see:" in " ".join(ast.get_docstring(ast.parse(text)).split())
    assert text.count("# the new line") == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_runs_alone_and_says_what_the_page_quotes(script, tmp_path):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
    }  # as a file has it, without colours
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    said = shape(result.stdout + result.stderr)
    quoted = [each for each in re.findall(r'"([^"]+)"', rows()[script.name])]
    assert quoted
    assert [each for each in quoted if shape(each) not in said] == []
    if script.stem == "regression":  # whose sentences the README shows
        readme = (FOLDER.parents[1] / "README.md").read_text()
        block = readme[readme.index("    In plain words: ") : readme.index("\n\n`ok` and")]
        parts = [shape(part) for part in re.split(r"^ +\.\.\.$", block, flags=re.MULTILINE)]
        assert len(parts) > 3
        assert [part for part in parts if part not in said] == []
    pages = list(tmp_path.glob("lightning_logs/*/convergence.html"))
    assert len(pages) == 1
    assert shape(quoted[-1]) in shape(re.sub(r"<[^>]+>", "", pages[0].read_text()).replace("&#x27;", "'"))
