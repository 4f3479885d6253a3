"""Measure what the diagnostics cost: runs with and without them, in turn; write docs/results/overhead.md.

``python benchmarks/overhead.py [NAME ...]``; with names, only the table of these runs is printed.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.loggers.logger import Logger
from ntk_bench.calibration import processor

from lightning_conv.callbacks import ConvergenceDiagnostics
from lightning_conv.recipes import DigitsDataModule, WideFC
from lightning_conv.reporting.markdown import markdown_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))
from case import Case
from cases import CASES
from cases.shapes import GPT, SmallGpt
from samples import floats, labels, padding, rows, table, tokens
from zoo_judge import fit

SECONDS = 20.0
"""Seconds that a long run takes at least, alone."""
ROUNDS = 3
HOPELESS = 3.0
"""Ratio from which on a run is not repeated."""
PAGE = Path(__file__).parents[1] / "docs" / "results" / "overhead.md"
MANY = 256
SHORT = (
    *("dict_batch", "optional_mask", "small_gpt", "segmentation", "squeezed", "autoencoder", "vae", "gan_from_data"),
    *(
        "lstm",
        "conv_batch_norm",
        "resnet18",
        "vit",
        "frozen_resnet",
        "segmentation_dict",
        "demo_transformer",
        "bert",
        "gpt2",
    ),
)


COLUMNS = (
    *("run", "seconds alone", "seconds more", "ratio: median (smallest, largest)", "ratio of processor time"),
    "measurements with bounds",
)


class Pair(NamedTuple):
    """One run without and one with the diagnostics."""

    plain: float  # seconds
    watched: float
    of_processor: float  # ratio of the seconds of the processor
    measurements: int  # with bounds

    @property
    def ratio(self) -> float:
        """Wall time with the diagnostics over that without."""
        return self.watched / self.plain


class WiderGpt(SmallGpt):
    """A GPT of two layers over 64 tokens and 16 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(vocabulary=64, width=32, layers=2, positions=17, heads=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Bounds(Logger):
    """Counts the measurements whose smallest eigenvalue has finite bounds."""

    name, version = "bounds", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: set[int] = set()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Keep nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the step if its bounds are finite."""
        both = [metrics.get(f"kernel/lambda_min_{side}", math.nan) for side in ("lower", "upper")]
        if all(math.isfinite(bound) for bound in both):
            self.steps.add(int(step or 0))


def of_zoo(name: str) -> Case:
    """Return the case of this name."""
    return next(case for case in CASES if case.name == name)


def long_runs() -> dict[str, Case]:
    """Return the runs that are made long: members of the zoo with more samples, the GPT, and the recipe on the digits."""
    y = labels(count=MANY)
    masked = {"input_ids": tokens(16, count=MANY), "attention_mask": padding(16, count=MANY), "labels": y}
    data: dict[str, Callable[[], Any]] = {
        "dict_batch": rows(32, x=floats(6, count=MANY), y=y),
        "optional_mask": rows(32, **masked),
        "segmentation": table(floats(1, 16, 16, count=MANY), labels(2, 16, 16, count=MANY), batch_size=32),
        "autoencoder": table(floats(6, count=MANY), batch_size=32),
        "lstm": table(floats(20, 3, count=MANY), y, batch_size=32),
        "conv_batch_norm": table(floats(2, 6, 6, count=MANY), y, batch_size=32),
        "resnet18": table(floats(3, 32, 32, count=MANY), y, batch_size=32),
        "bert": rows(32, **masked | {"input_ids": tokens(16, 12, count=MANY)}),
    }
    found = {name: replace(of_zoo(name), data=made, options={}) for name, made in data.items()}
    texts = table(tokens(17, 64, MANY), batch_size=32)
    found["gpt"] = replace(of_zoo("small_gpt"), module=WiderGpt, data=texts)
    digits = {"module": lambda: WideFC(guard=False, diagnostics=False), "options": {"limit_val_batches": 0}}
    found["wide_fc"] = replace(of_zoo("dict_batch"), data=DigitsDataModule, **digits)
    return {name: case for name, case in found.items() if not case.needs or _installed(case.needs)}


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def pair(case: Case, epochs: int) -> Pair | str:
    """Run the case without and with the diagnostics; a string: why it does not run with them."""
    bounds = Bounds()
    plain = fit(case, max_epochs=epochs, logger=Bounds())
    try:
        watched = fit(case, [ConvergenceDiagnostics()], max_epochs=epochs, logger=bounds)
    except Exception as error:  # whatever a user would see
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Pair(plain.seconds, watched.seconds, watched.of_processor / plain.of_processor, len(bounds.steps))


def epochs_for(case: Case, seconds: float) -> int:
    """Return how many epochs take so long, from a run that is long enough to tell."""
    epochs, taken = 2, fit(case, max_epochs=2).seconds
    while taken < min(1.0, seconds):
        epochs *= 4
        taken = fit(case, max_epochs=epochs).seconds
    return max(epochs, math.ceil(1.15 * epochs * seconds / taken))


def measured(name: str, case: Case, epochs: int) -> tuple[str, ...]:
    """Return a row of the table, with the columns ``COLUMNS``."""
    pairs: list[Pair] = []
    while len(pairs) < ROUNDS and not any(each.ratio > HOPELESS for each in pairs):
        found = pair(case, epochs)
        print(name, epochs, found, flush=True)
        if isinstance(found, str):
            return f"`{name}`", "", "", found, "", ""
        pairs.append(found)
    ratios = [each.ratio for each in pairs]
    return (
        f"`{name}`",
        f"{statistics.median(each.plain for each in pairs):.2f}",
        f"{statistics.median(each.watched - each.plain for each in pairs):.2f}",
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})",
        f"{statistics.median(each.of_processor for each in pairs):.3f}",
        str(min(each.measurements for each in pairs)),
    )


def results(chosen: Sequence[str]) -> tuple[str, str]:
    """Return the table of the long runs and that of the short ones; with names, of these."""
    long = {name: case for name, case in long_runs().items() if not chosen or name in chosen}
    long_rows = [measured(name, case, epochs_for(case, SECONDS)) for name, case in long.items()]
    short = [of_zoo(name) for name in SHORT if not chosen]
    short_rows = [measured(c.name, c, 2) for c in short if not c.needs or _installed(c.needs)]
    return markdown_table(COLUMNS, long_rows), markdown_table(COLUMNS, short_rows)


def main(chosen: Sequence[str]) -> None:
    """Measure, print, and write the page."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fit(of_zoo("dict_batch"), [ConvergenceDiagnostics()])  # loads what is loaded once
    long, short = results(chosen)
    text = f"""# What the diagnostics cost

Runs with `ConvergenceDiagnostics()` at its defaults against the same runs without, in turn. Pairs of runs per row: {ROUNDS}, or one
where the ratio is above {HOPELESS:.0f}. Made by `python benchmarks/overhead.py` on {date.today()}, {processor()}, {torch.get_num_threads()}
threads, torch {torch.__version__}.
Seconds are those of `Trainer.fit`, the first and the last measurement included. The machine's unrest is in the
ratios; less so in those of processor time.

## Runs of {SECONDS:.0f} seconds or more

Members of the zoo (`tests/zoo/`) with {MANY} samples, a GPT of two layers over 64 tokens and 16 positions, and the recipe `WideFC` on the
digits, each for as many epochs as the time takes.

{long}

## Short runs

Members of the zoo as they are.

{short}
"""
    print(text)
    if not chosen:
        PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
