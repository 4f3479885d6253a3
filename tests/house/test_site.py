"""The site of the documentation is built as `make docs` does it: no warning, no dead link, every public name, nothing from a network."""

import ast
import re
import shlex
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

PACKAGE = re.compile(r"^\.\. package:: (\S+)$", re.MULTILINE)


class Page(HTMLParser):
    """A page: the anchors that it has, the links that it makes, what it loads, and how many formulas it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded, self.formulas = set(), [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given["id"]} if given.get("id") else set()
        self.formulas += tag == "math"
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in {"script", "img", "link", "iframe", "source"}:
            self.loaded += [given[name] for name in ("src", "href") if given.get(name)]


def exports(house) -> dict[str, list[str]]:
    """Return the packages with an `__all__`, each with the names in it, as the source has them."""
    found = {}
    for module, path in house.modules().items():
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    found[module] = ast.literal_eval(node.value)
    return found


def described(site: Path) -> set[str]:
    """Return the full names in the inventory of the site: packages, classes, functions and data."""
    raw = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(raw.split(b"\n", 4)[4]).decode().splitlines()
    return {line.split()[0] for line in lines if " py:" in line}


@pytest.fixture(scope="module")
def site(house, tmp_path_factory):
    """The built site; the command is the one of the Makefile, with another folder for what it writes."""
    pytest.importorskip("sphinx", reason='needs the extra "docs"')
    recipe = re.search(
        r"^docs:.*\n\t.*?(\$\(BIN\)/python .*?) &&", (house.root / "Makefile").read_text(), re.MULTILINE
    )[1]
    out = tmp_path_factory.mktemp("docs")
    command = recipe.replace("$(BIN)/python", shlex.quote(sys.executable)).replace(
        "build/", f"{shlex.quote(str(out))}/"
    )
    assert {"-W", "docs", f"{out}/site"} <= set(shlex.split(command))
    result = subprocess.run(shlex.split(command), cwd=house.root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return out / "site"


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_package_has_one_place_in_the_reference(house):
    texts = [page.read_text() for page in sorted((house.root / "docs" / "reference").glob("*.md"))]
    places = [name for text in texts for name in PACKAGE.findall(text)]
    assert len(places) == len(set(places))
    assert set(exports(house)) <= set(places)


@pytest.mark.slow
def test_every_public_name_is_described(house, site):
    known = described(site)
    values = []
    for full in known:
        package, _, name = full.rpartition(".")
        if package in sys.modules or package in exports(house):
            values.append((name, getattr(import_module(package), name, None)))
    missing = []
    for package, names in exports(house).items():
        for name in names:
            value = getattr(import_module(package), name)
            listed = value.__name__ in known if isinstance(value, ModuleType) else (name, value) in values
            missing += [] if listed else [f"{package}.{name}"]
    assert sum(map(len, exports(house).values())) > 200
    assert missing == []


@pytest.mark.slow
def test_every_link_within_the_site_leads_to_a_page_and_an_anchor(pages):
    broken, followed = [], 0
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            place = (path.parent / unquote(target)).resolve() if target else path
            followed += 1
            if not place.is_file() or (
                anchor and place.suffix == ".html" and unquote(anchor) not in pages[place].anchors
            ):
                broken.append(f"{path.name}: {link}")
    assert followed > 5000
    assert broken == []


@pytest.mark.slow
def test_nothing_is_loaded_from_a_network(site, pages):
    loaded = [item for page in pages.values() for item in page.loaded]
    assert len(loaded) > 100
    assert [item for item in loaded if re.match(r"(https?:)?//", item)] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not any(re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style) for style in styles)


@pytest.mark.slow
def test_formulas_are_mathml_and_no_latex_is_left(site, pages):
    source = (site.parent / "site" / "glossary.html").read_text(encoding="utf-8")
    assert sum(page.formulas for page in pages.values()) > 800
    assert "<msub>" in source
    assert "\\frac" not in source
    assert "\\|" not in source


@pytest.mark.slow
def test_the_first_page_leads_to_every_page(site, pages):
    seen, waiting = set(), [site / "index.html"]
    while waiting:
        path = waiting.pop()
        if path not in seen and path in pages:
            seen.add(path)
            targets = [link.partition("#")[0] for link in pages[path].links if not re.match(r"[a-z]+:", link)]
            waiting += [(path.parent / unquote(target)).resolve() for target in targets if target]
    assert {path for path in pages if path not in seen} <= {site / "search.html"}  # the form in the margin leads there
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(
        f'"{path.relative_to(site).with_suffix("").as_posix()}"' in index
        for path in (site / "reference").glob("*.html")
    )
