"""Links of the documentation lead somewhere, and the glossary explains each term once, in order."""

import re
from itertools import pairwise
from pathlib import Path

import lightning_conv
import lightning_conv.callbacks
import lightning_conv.metrics

FACES = (lightning_conv, lightning_conv.callbacks, lightning_conv.metrics)


def _prose(page: Path) -> str:
    """Return the page without its code blocks and code spans, in which brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def _anchors(page: Path) -> list[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def _pages(root: Path) -> list[Path]:
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def _glossary(root: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the groups of the glossary, each with its terms and their texts."""
    groups = re.split(r"^## (.+)$", (root / "docs" / "glossary.md").read_text(), flags=re.MULTILINE)[1:]
    found = []
    for group, text in zip(groups[::2], groups[1::2], strict=True):
        parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)[1:]
        found.append((group, list(zip(parts[::2], parts[1::2], strict=True))))
    return found


def test_every_relative_link_and_anchor_resolves(house):
    broken = []
    for page in _pages(house.root):
        for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            place = page.parent / path if path else page
            if not place.exists() or (anchor and anchor not in _anchors(place)):
                broken.append(f"{page.relative_to(house.root)}: {target}")
    assert broken == []


def test_the_glossary_explains_thirty_terms_once_and_in_order(house):
    groups = _glossary(house.root)
    terms = [term.lower() for _, entries in groups for term, _ in entries]
    assert len(terms) == len(set(terms)) == 30
    for _, entries in groups:
        assert all(one.lower() < two.lower() for (one, _), (two, _) in pairwise(entries))
    for _, entries in groups:
        for term, text in entries:
            assert 2 <= len(re.findall(r"\.(?=\s)", text)) <= 7, term


def test_the_glossary_names_functions_that_exist(house):
    text = (house.root / "docs" / "glossary.md").read_text()
    names = [code for code in re.findall(r"`([A-Za-z_]+)(?:[.(][^`]*)?`", text) if re.search(r"[A-Z_]", code)]
    assert len(names) > 10
    assert [name for name in names if not any(hasattr(face, name) for face in FACES)] == []


def test_every_page_of_the_documentation_links_to_the_glossary(house):
    folders = [house.root / "docs" / name for name in ("", "how_to", "concepts", "notebooks", "reference")]
    pages = [page for folder in folders for page in sorted(folder.glob("*.md")) if page.name != "glossary.md"]
    pages += [house.root / "README.md", *sorted((house.root / "docs").rglob("README.md"))]
    assert [page.name for page in pages if "glossary.md" not in page.read_text()] == []


def test_no_cell_of_a_table_has_more_than_a_hundred_words(house):
    long = []
    for page in _pages(house.root):
        for line in page.read_text().splitlines():
            cells = re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else []
            long += [f"{page.name}: {cell.strip()[:50]}" for cell in cells if len(cell.split()) > 100]
    assert long == []
