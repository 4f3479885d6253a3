"""The command `lightning-conv tables`: plan the runs, execute those that are missing, write the page.

Nothing heavy is imported before the options are read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from lightning_conv.recipes.named_configs import config_file, guarded_recipe_names
from lightning_conv.recipes.paper_tables.ledger import Cell, Ledger
from lightning_conv.recipes.paper_tables.page import TITLE, render
from lightning_conv.recipes.small import EPOCHS, SAMPLES, is_small
from lightning_conv.recipes.usage import UsageError, UsageParser, did_you_mean

DESCRIPTION = """\
Run the recipes with and without the guard and write the two tables of Kawaguchi & Sun's experiments, as this program measures them:
the rank of [h, 1] (at initialisation, and certified at the switch), and the test error of the base run against that of the guarded
run, over seeds, with equal settings and numbers of steps. Finished runs are kept in OUT/paper_tables.json: the same command continues
where it was stopped, other commands add to the tables.
"""

EXAMPLES = """\
examples:
  lightning-conv tables --data digits --seeds 3 --out tables
  lightning-conv tables --data MNIST --root data --n 2000 --epochs 15 --set wide_fc.lr=0.03
"""


OUT = "runs/tables"


def parser() -> UsageParser:
    """Return the parser of the command's options."""
    made = UsageParser("tables", description=DESCRIPTION, epilog=EXAMPLES)
    add = made.add_argument
    add("--data", default="digits", help="data sets, separated by commas: digits, or torchvision's (default: digits)")
    add("--root", default="data", help="folder of the torchvision data sets; nothing is downloaded (default: data)")
    add("--recipes", default="wide_fc,bn_resnet", help="recipes, separated by commas (default: wide_fc,bn_resnet)")
    add("--seeds", type=_positive, default=3, help="runs with seeds 0, 1, ... (default: 3)")
    add("--n", type=_positive, help="training samples, at most; the wide layer grows with them (default: all)")
    add("--n-test", type=_positive, help="test samples of torchvision's data sets (default: all)")
    add("--epochs", type=_positive, help="epochs of every run (default: those of the recipe)")
    add("--augment", choices=("off", "on", "both"), default="both", help="random shifts (default: both)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="RECIPE.NAME=VALUE",
        help="another value of a setting of a recipe's model, such as wide_fc.lr=0.03; may be repeated",
    )
    add("--accelerator", default="auto", help="accelerator of Lightning's trainer (default: auto)")
    where = f"folder of paper_tables.md and paper_tables.json (default: {OUT})"
    add("--out", "--output", metavar="FOLDER", default=OUT, help=where)
    return made


def _positive(word: str) -> int:
    try:
        number = int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {word!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run(words: Sequence[str]) -> None:
    """Execute the missing runs and write the page after each.

    Args:
        words: words of the command line after `tables`.

    Raises:
        UsageError: if an option is wrong, the file of results cannot be read, or a page of somebody else is in its place.
    """
    options = parser().parse_args(list(words))
    if is_small():
        options.seeds, options.n, options.epochs = 1, SAMPLES, EPOCHS
    try:
        ledger = Ledger.read(Path(options.out) / "paper_tables.json")
    except ValueError as error:
        raise UsageError(str(error)) from error
    page = Path(options.out) / "paper_tables.md"
    _require_own(page)
    _require_writable(page)
    planned = list(plan(options))
    missing = [cell for cell in planned if ledger.result(cell) is None]
    _say(f"{len(planned)} runs, of which {len(planned) - len(missing)} are in {ledger.path}")
    if missing:
        from lightning_conv.recipes.paper_tables.cells import run_cell
        from lightning_conv.reporting.progress import LONG, progress_bar, said_duration

        ledger.begin(words)
        gone = 0.0
        for number, cell in enumerate(missing, 1):
            begun = time.perf_counter()
            with progress_bar(f"{number}/{len(missing)} {cell.title}", LONG, None) as report:
                result = run_cell(cell, options.root, options.accelerator, report)
            ledger.keep(cell, result)
            page.write_text(render(ledger))
            gone += time.perf_counter() - begun
            outcome = f"test error {100 * result['test_error']:.2f} %, {result['seconds']:.0f} s"
            if number < len(missing):
                outcome += f"; about {said_duration(gone / number * (len(missing) - number))} to go"
            _say(f"{number}/{len(missing)} {cell.title}: {outcome}")
    page.write_text(render(ledger))
    print(page.read_text(), end="")
    _say(f"written: {page}, {ledger.path}")


def _require_own(page: Path) -> None:
    """Refuse to write over a page that this command has not made."""
    try:
        if page.exists() and not page.read_text("utf-8").startswith(TITLE):
            raise UsageError(
                f"tables: {page} is not a page of this command; move it away, or name another folder by --out"
            )
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"tables: {page} cannot be read as a page of this command; name another folder by --out"
        ) from error


def _require_writable(page: Path) -> None:
    """Refuse a folder in which nothing can be written, before hours are spent on the runs; it is made with the first result."""
    place = next(each for each in (page, *page.absolute().parents) if each.exists())
    reason = f"{place} is no folder" if place != page and not place.is_dir() else f"{place} is read-only"
    if (place != page and not place.is_dir()) or not os.access(place, os.W_OK):
        raise UsageError(f"tables: {page} cannot be written ({reason}); name another folder by --out")


def plan(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield the runs that the options ask for, after checking that the data are there.

    Args:
        options: parsed options, see `parser`.

    Yields:
        The cells, seed by seed, so that every table has a first version early.

    Raises:
        UsageError: if a recipe, a data set or a setting is unknown.
    """
    recipes, changes = _words(options.recipes), _changes(options.set)
    for name in [*recipes, *changes]:
        if name not in guarded_recipe_names():
            hint = did_you_mean(name, guarded_recipe_names()) or ";"
            known = ", ".join(guarded_recipe_names())
            raise UsageError(f"recipes: {name!r} is not a recipe with a guard{hint} choose from: {known}")
    if unused := [name for name in changes if name not in recipes]:
        raise UsageError(f"set: {unused[0]!r} is not among the recipes that are run: {', '.join(recipes)}")
    if not recipes or not _words(options.data):
        raise UsageError("data, recipes: name at least one of each")
    sizes = {name: _size(name, options) for name in map(_data_name, _words(options.data))}
    augmentations = {"off": (False,), "on": (True,), "both": (False, True)}[options.augment]
    for augment, seed, data, recipe in product(augmentations, range(options.seeds), sizes, recipes):
        config = _config(recipe)
        changed = _checked(recipe, changes.get(recipe, {}), config["model"]["init_args"])
        # Settings that the tables fix themselves.
        fixed = {"guard", "diagnostics", "measure_every", "probe_size"}
        settings = {**config["model"]["init_args"], **changed}
        for guard in (False, True):
            yield Cell(
                data=data,
                n=sizes[data],
                n_test=None if data == "digits" else options.n_test,
                recipe=recipe,
                settings={name: value for name, value in settings.items() if name not in fixed},
                changed=changed,
                batch_size=config["data"]["init_args"]["batch_size"],
                epochs=options.epochs or config["trainer"]["max_epochs"],
                augment=augment,
                seed=seed,
                guard=guard,
            )


def _words(text: str) -> list[str]:
    """Return the words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _data_name(word: str) -> str:
    """Return `digits` or torchvision's name of a data set, whatever the case."""
    from lightning_conv.recipes.torchvision_data import SPLIT_ARGUMENT

    known = {name.lower(): name for name in ("digits", *SPLIT_ARGUMENT)}
    if word.lower() not in known:
        hint = did_you_mean(word, known.values())
        raise UsageError(f"data: {word!r} is not one of {', '.join(known.values())}{hint}")
    return known[word.lower()]


def _size(name: str, options: argparse.Namespace) -> int:
    """Return the number of training samples; a data set that is not there is reported before the first run."""
    from lightning_conv.recipes.paper_tables.cells import open_data

    there = open_data(name, options.root).count_train()
    return min(there, options.n or there)


def _config(recipe: str) -> dict[str, Any]:
    """Return the packaged configuration of a recipe."""
    config: dict[str, Any] = yaml.safe_load(config_file(recipe).read_text("utf-8"))
    return config


def _changes(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return `RECIPE.NAME=VALUE` as {recipe: {name: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        recipe, dot, name = target.partition(".")
        if not equals or not dot:
            raise UsageError(f"set: {assignment!r}; need RECIPE.NAME=VALUE, such as wide_fc.lr=0.03")
        try:
            found.setdefault(recipe, {})[name] = json.loads(value)
        except ValueError:
            found.setdefault(recipe, {})[name] = value  # a word, such as resnet8
    return found


def _checked(recipe: str, changes: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the values that differ from those of the recipe; refuse unknown and fixed settings."""
    for name, value in changes.items():
        if name not in settings:
            raise UsageError(
                f"set: {recipe} has no setting {name!r}; it has {', '.join(settings)}{did_you_mean(name, settings)}"
            )
        if name in ("guard", "diagnostics"):
            raise UsageError(f"set: {name} is what the tables compare, or leave out; it cannot be set")
        default = settings[name]
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is not None and not isinstance(value, kinds):
            raise UsageError(f"set: {recipe}.{name}={value!r}; need a value like {default!r}")
    return {name: value for name, value in changes.items() if value != settings[name]}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
