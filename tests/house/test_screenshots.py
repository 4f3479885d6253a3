"""The tool behind `make screenshots` notices a chart that is missing or empty, and what it takes is in the documentation."""

import asyncio
import re
import shutil
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs"))

from _screenshots import browser as tool
from _screenshots.dashboard import expected_charts, logged_images
from _screenshots.looks import CHARTS, Card, cards, faults
from _screenshots.pictures import LARGEST, Album

HAS_BROWSER = any(shutil.which(name) for name in tool.NAMES)
needs_browser = pytest.mark.skipif(not HAS_BROWSER, reason=f"needs one of {', '.join(tool.NAMES)}")

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


def test_without_a_browser_the_error_names_those_that_are_looked_for(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(tool.BrowserError, match=r"no browser found \(looked for chromium, .*\); install one of them"):
        tool.find_browser()


def test_missing_empty_and_unexpected_charts_are_named():
    shown = [Card("loss", 3), Card("gap", 0), Card("other", 1)]
    assert faults(shown, ["loss", "gap", "spectrum"], "a run") == [
        "a run: there is no chart 'spectrum'",
        "a run: the chart 'gap' is empty",
        "a run: nothing has asked for the chart 'other'",
    ]
    assert faults([Card("loss", 3)], ["loss"], "a run") == []


def test_the_expected_charts_are_those_of_the_layout_that_the_run_has_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    logger.experiment.add_custom_scalars({"first": {"one": ["Multiline", ["a$"]], "two": ["Multiline", ["b"]]}})
    logger.finalize("success")
    assert sorted(expected_charts(tmp_path / "run")) == ["one", "two"]
    assert logged_images(tmp_path / "run") == []


def test_every_picture_is_small_and_shown_on_a_page(house):
    pages = "".join(page.read_text() for page in [house.root / "README.md", *(house.root / "docs").rglob("*.md")])
    pictures = sorted(IMAGES.rglob("*.png"))
    assert len(pictures) > 20
    assert [path.name for path in pictures if path.stat().st_size >= LARGEST] == []
    assert [path.name for path in pictures if path.relative_to(IMAGES).as_posix() not in pages] == []


def test_every_picture_shows_something():
    for path in sorted(IMAGES.rglob("*.png")):
        colours = Image.open(path).convert("RGB").getcolors(1 << 24)
        largest = max(count for count, _ in colours)
        assert len(colours) > 8, path
        assert largest < 0.97 * sum(count for count, _ in colours), path


PAGE = """<!doctype html><title>t</title><script type="application/json" id="data-charts">[{"lines": [{"y": [1, null, 2]}]},
{"lines": [{"y": [null]}]}]</script><div class="chart" data-chart="0"><h3>full</h3><div class="plot"><canvas></canvas></div></div>
<div class="chart" data-chart="1"><h3>empty</h3><div class="plot"><canvas></canvas></div></div>"""


@needs_browser
@pytest.mark.slow
def test_the_browser_sees_which_chart_of_a_page_is_empty(tmp_path):
    (tmp_path / "page.html").write_text(PAGE)

    async def look() -> tuple[list[Card], Album]:
        async with tool.browser() as page:
            album = Album(page, tmp_path)
            await page.open((tmp_path / "page.html").as_uri(), width=400, height=300)
            shown = await cards(page, CHARTS)
            await album.take("picture")
            return shown, album

    shown, album = asyncio.run(look())
    assert [(each.title, each.drawn) for each in shown] == [("full", 2), ("empty", 0)]
    assert [path.name for path in album.taken] == ["picture.png"]
    assert Image.open(tmp_path / "picture.png").size == (400, 300)
    assert not re.search("picture", " ".join(album.faults))
