"""The map at the top of CONTRIBUTING.md names paths that exist, and answers a newcomer's questions."""

import re

QUESTIONS = ("computed", "logged", "layer rule", "criterion", "laboratory", "recipe", "health", "sketches")


def _map(house) -> str:
    text = (house.root / "CONTRIBUTING.md").read_text()
    return text[text.index("## The map") : text.index("## Set up")]


def test_every_path_on_the_map_exists(house):
    paths = [code for code in re.findall(r"`([^`\n]+)`", _map(house)) if "/" in code]
    assert len(paths) >= len(QUESTIONS)
    assert [path for path in paths if not (house.root / path).exists()] == []


def test_every_question_has_one_path(house):
    rows = re.findall(r"^\| (Where .*\?) \| `([^`]+)` \|$", _map(house), flags=re.MULTILINE)
    assert len(rows) == len(QUESTIONS)
    for word, (question, _) in zip(QUESTIONS, rows, strict=True):
        assert word in question
