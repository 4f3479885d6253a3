"""The pictures, each with what is checked while it is taken."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from _screenshots.browser import Page
from _screenshots.dashboard import expected_charts, has_hyper_parameters, logged_images, tensorboard
from _screenshots.looks import CARDS, CHARTS, IMAGES, OPEN_GROUPS, UNTICK_CONSTANTS, WORDS, Card, cards, faults

LARGEST = 300_000
"""Bytes of a picture."""

WIDTH = 1500
"""Of a window with a TensorBoard, in which three of its charts stand side by side."""

IGNORE_OUTLIERS = "try { localStorage.setItem('_ignoreYOutliers', '%s') } catch { }"
"""Ticks TensorBoard's "Ignore outliers in chart scaling", or unticks it, since it cuts off the first points of a few; no address can."""

WITHOUT_LIMITS = "&regexInput=%5E(%3F!.*limits%24)"
"""Shows all runs but those called ``limits``."""


class Album:
    """Takes pictures and notes what is wrong with what they show.

    Args:
        page: Of the browser.
        folder: Where the pictures are written.

    Attributes:
        faults: What is wrong.
        taken: The files.
    """

    def __init__(self, page: Page, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.faults: list[str] = []
        self.taken: list[Path] = []

    async def take(self, name: str, clip: dict[str, float] | None = None) -> None:
        """Take what the window shows, or a part of the page, and write it in a palette of 256 colours.

        Args:
            name: Of the picture, without its ending.
            clip: The part; None: the window.
        """
        path = self.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(await self.page.picture(clip))).convert("RGB")
        if len(picture.getcolors(1 << 24) or []) < 2:
            self.faults.append(f"{path.name}: the picture has one colour")
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        if (size := path.stat().st_size) >= LARGEST:
            self.faults.append(f"{path.name}: {size} bytes; fewer than {LARGEST} are wanted")
        self.taken.append(path)

    async def settled(self, script: str) -> list[Card]:
        """Return the charts of the page once two looks, a second apart, see the same."""
        before: list[Card] = []
        for _ in range(60):
            now = await cards(self.page, script)
            if now and now == before:
                return now
            before = now
            await asyncio.sleep(1)
        return before

    async def dashboard(
        self, runs: Sequence[Path], logdir: Path, name: str, *, height: int, dark: bool = False, few: bool = True
    ) -> None:
        """Take the tab "Custom scalars" of runs; their own layouts say which charts have to be there.

        Args:
            runs: Folders of their loggers.
            logdir: Folder that holds these runs alone.
            name: Of the picture.
            height: Of the picture; all charts are checked.
            dark: In dark mode.
            few: Whether the runs are so few that outliers and what the values are held against can be shown.
        """
        await self.page.call("Page.addScriptToEvaluateOnNewDocument", source=IGNORE_OUTLIERS % str(not few).lower())
        with tensorboard(logdir) as address:
            theme = "?darkMode=true" if dark else "?darkMode=false"
            fragment = f"#custom_scalars&_smoothingWeight=0{'' if few else WITHOUT_LIMITS}"
            await self.page.open(f"{address}/{theme}{fragment}", width=WIDTH, height=6000, dark=dark)
            shown = await self.settled(CARDS)
            wanted = list(dict.fromkeys(title for run in runs for title in expected_charts(run)))
            self.faults += faults(shown, wanted, name)
            await self.page.resize(WIDTH, height)
            await asyncio.sleep(1)
            await self.take(name)

    async def images(self, run: Path, logdir: Path, name: str, *, height: int, dark: bool = False) -> None:
        """Take the tab "Images" of one run; the tags that it has logged say which have to be there."""
        with tensorboard(logdir) as address:
            theme = "?darkMode=true" if dark else "?darkMode=false"
            await self.page.open(f"{address}/{theme}#images", width=WIDTH, height=6000, dark=dark)
            await self.page.wait_for(OPEN_GROUPS, "the groups of images")
            shown = await self.settled(IMAGES)
            self.faults += faults(shown, logged_images(run), name)
            await self.page.resize(WIDTH, height)
            await asyncio.sleep(1)
            await self.take(name)

    async def hyper_parameters(self, folder: Path, name: str, *, height: int) -> None:
        """Take the tab "HParams" of several runs, in which each of them has a row; columns of what never changed are hidden.

        Args:
            folder: Of the runs.
            name: Of the picture.
            height: Of the picture.
        """
        runs = sorted(each.parent for each in folder.glob("*/convergence.html"))
        if without := [each.name for each in runs if not has_hyper_parameters(each)]:
            self.faults.append(f"{name}: no hyper-parameters were logged for TensorBoard by {', '.join(without)}")
            return
        with tensorboard(folder) as address:
            await self.page.open(f"{address}/?darkMode=false#hparams", width=WIDTH + 80, height=height)
            await self.page.wait_for(UNTICK_CONSTANTS, "the settings of the runs")
            await asyncio.sleep(3)
            words = await self.page.run(WORDS)
            self.faults += [f"{name}: there is no row {each.name!r}" for each in runs if each.name not in words]
            await self.take(name)

    async def charts(self, file: Path, *, width: int) -> list[Card]:
        """Open a ``convergence.html`` in a window of a width, and return its charts with their places."""
        await self.page.open(file.resolve().as_uri(), width=width, height=1100)
        return await self.settled(CHARTS)

    async def report(
        self, file: Path, name: str, *, height: int, dark: bool = False, lines: int = 1, charts: bool = False
    ) -> list[Card]:
        """Take the upper part of a ``convergence.html``, or its first charts, and return all of its charts.

        Args:
            file: The page.
            name: Of the picture.
            height: Of the picture.
            dark: In dark mode.
            lines: Lines that some chart has to have at least, such as one for each run.
            charts: Whether the picture begins with the first chart.
        """
        await self.page.open(file.resolve().as_uri(), width=1000, height=height, dark=dark)
        shown = await self.settled(CHARTS)
        wanted = list(dict.fromkeys(each.title for each in shown))
        self.faults += faults(shown, wanted, name)
        if not shown or max(each.lines for each in shown) < lines:
            self.faults.append(f"{name}: no chart has {lines} lines")
        top = min((each.box["y"] for each in shown if each.box), default=0.0) - 60 if charts else 0.0
        await self.take(name, {"x": 0, "y": max(top, 0.0), "width": 1000, "height": height})
        return shown
