"""`make screenshots`: train the runs, take every picture of the documentation, and say what is missing or empty in what they show.

The runs are kept in build/screenshots, so that a second call takes the pictures only; ``--fresh`` trains them again.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from _screenshots import runs  # noqa: E402 - found only with the path above
from _screenshots.browser import Page, browser, find_browser  # noqa: E402
from _screenshots.looks import Card  # noqa: E402
from _screenshots.pictures import Album  # noqa: E402
from lightning_conv.recipes.report_command import report  # noqa: E402

PAIRS = {
    "Loss": ("adamw", "rate_far_too_large"),
    "Stability ratio": ("descent", "rate_far_too_large"),
    "lambda_min": ("descent", "dead_layer"),
    "Change of the kernel": ("adamw", "rate_far_too_large"),
    "Alignment": ("adamw", "rate_far_too_large"),
    "Gap to the infimum": ("guard", None),
    "Forecast": ("descent", None),
    "Largest eigenvalue and trace": ("descent", "rate_far_too_large"),
    "PL ratio": ("descent", "dead_layer"),
    "Path of the weights": ("descent", "rate_far_too_large"),
    "Error and its prediction": ("descent", "rate_far_too_large"),
}
"""For every chart of a page: the run of the gallery that is well, and the one that is not; None: only a run that is well has it."""


NARROW = 560
"""Pixels of a window whose charts can be read when two of them stand side by side."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python docs/_screenshots", description="Take the pictures of the documentation."
    )
    made.add_argument("--runs", type=Path, default=Path("build/screenshots/runs"), help="where the runs are kept")
    made.add_argument("--out", type=Path, default=HERE.parent / "images", help="where the pictures are written")
    made.add_argument("--fresh", action="store_true", help="train the runs again")
    return made


def slug(title: str) -> str:
    """Return the name of the pictures of a chart."""
    return "_".join(title.lower().split())


async def pairs(album: Album, folder: Path) -> None:
    """Take every chart of a page of a run that is well, beside that of one that is not."""
    wanted: dict[str, list[tuple[str, str]]] = {}
    for title, (well, sick) in PAIRS.items():
        wanted.setdefault(well, []).append((title, "healthy"))
        if sick is not None:
            wanted.setdefault(sick, []).append((title, "sick"))
    for name, charts in wanted.items():
        place = runs.gallery_run(name, folder)
        await album.report(place / "convergence.html", f"gallery/{name}", height=1100)
        shown = await album.charts(place / "convergence.html", width=NARROW)
        boxes = {each.title: each.box for each in shown}
        for title, state in charts:
            if boxes.get(title) is None:
                album.faults.append(f"{name}: there is no chart {title!r}")
            else:
                await album.take(f"dashboard/{slug(title)}_{state}", boxes[title])
        album.faults += [f"{name}: PAIRS lacks the chart {title!r}" for title in _panels(shown) if title not in PAIRS]


def _panels(shown: list[Card]) -> list[str]:
    """Return the titles of charts that are not those of single tags."""
    return [each.title for each in shown if "/" not in each.title]


async def take_all(page: Page, folder: Path, out: Path) -> Album:
    """Train what is not there, take all pictures, and return them with their faults."""
    folder.mkdir(parents=True, exist_ok=True)
    album = Album(page, out)
    recipes, one = folder / "recipe", folder / "one"
    recipe = runs.recipe(recipes)
    whole = runs.train(runs.descent, one, "descent", full=True)
    await album.dashboard([recipe], recipes, "tensorboard", height=740)
    await album.dashboard([whole], one, "tensorboard_all", height=1800)
    await album.dashboard([whole], one, "tensorboard_dark", height=740, dark=True)
    await album.images(whole, one, "tensorboard_images", height=1000)
    await album.images(whole, one, "tensorboard_images_dark", height=1000, dark=True)
    await album.report(whole / "convergence.html", "report", height=1400)
    await album.report(whole / "convergence.html", "report_dark", height=1400, dark=True)
    for layers in (10, 50):
        place = folder / f"deep_{layers}"
        deep = runs.train(lambda: runs.deep(layers), place, f"layers_{layers}", measurements=12)  # noqa: B023
        await album.images(deep, place, f"tensorboard_layers_{layers}", height=1000)
        await album.report(deep / "convergence.html", f"report_layers_{layers}", height=1400)
    rates = [runs.train(lambda: runs.at_rate(lr), folder / "rates", f"lr_{lr:g}") for lr in runs.RATES]  # noqa: B023
    for number, chosen in ((3, rates[2:5]), (7, rates)):
        together = folder / f"together_{number}"
        for run in chosen:
            shutil.copytree(run, together / run.name, dirs_exist_ok=True)
        for dark in (False, True):
            name = f"tensorboard_runs_{number}{'_dark' if dark else ''}"
            await album.dashboard(chosen, together, name, height=740, dark=dark, few=number == 3)
        file = folder / f"compared_{number}.html"
        report([*map(str, chosen), "--compare", "--out", str(file)])
        for dark in (False, True):
            name = f"compare_{number}{'_dark' if dark else ''}"
            await album.report(file, name, height=1100, dark=dark, lines=number, charts=True)
    await album.hyper_parameters(folder / "rates", "tensorboard_hparams", height=500)
    await pairs(album, folder / "gallery")
    album.faults += [f"a page reports: {each}" for each in page.errors]
    return album


async def _main(asked: argparse.Namespace) -> int:
    find_browser()  # before anything is trained
    if asked.fresh:
        shutil.rmtree(asked.runs, ignore_errors=True)
    began = time.monotonic()
    async with browser() as page:
        album = await take_all(page, asked.runs, asked.out)
    total = sum(path.stat().st_size for path in album.taken)
    print(f"{len(album.taken)} pictures in {asked.out}, {total / 1e6:.1f} MB, in {time.monotonic() - began:.0f} s")
    for each in album.faults:
        print(f"screenshots: {each}", file=sys.stderr)
    return 1 if album.faults else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(parser().parse_args())))
