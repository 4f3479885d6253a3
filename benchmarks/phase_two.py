"""Compare a step of phase 2 with a step of phase 1, with and without cached features; write docs/results/phase_two.md."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ntk_bench.calibration import processor

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.recipes import BNResNet, DigitsDataModule, WideFC
from lightning_conv.reporting.markdown import markdown_table

ROUNDS = 3
WARM_UP = 4
"""Number of steps of each phase that are not counted, because the first ones allocate memory and make one-time checks."""
PAGE = Path(__file__).parent.parent / "docs" / "results" / "phase_two.md"

RECIPES: dict[str, tuple[Callable[[], pl.LightningModule], int]] = {
    "wide_fc": (lambda: WideFC(guard=False, diagnostics=False), 8),
    "bn_resnet": (lambda: BNResNet(guard=False, diagnostics=False), 2),
}
"""The recipes with their default sizes, and the number of epochs of a run, half of them in each phase."""


class Timer(pl.Callback):
    """A callback that records the seconds of every step by phase, from the batch to the end of the optimizer's step."""

    def __init__(self, guard: ExpressivityGuard) -> None:
        self.guard = guard
        self.seconds: dict[int, list[float]] = {1: [], 2: []}

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock; the guard's own hook runs later."""
        self.seconds[self.guard.phase].append(time.perf_counter() - self.start)


def run(name: str, cached: bool) -> dict[int, float]:
    """Return the median seconds of a step in each phase of one run."""
    make, epochs = RECIPES[name]
    pl.seed_everything(0, verbose=False)
    guard = ExpressivityGuard(switch_at=0.5, on_undecided="continue", cache_features=cached)
    timer = Timer(guard)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        limit_val_batches=0,
        callbacks=[timer, guard],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make(), DigitsDataModule())
    return {phase: statistics.median(seconds[WARM_UP:]) for phase, seconds in timer.seconds.items()}


def row(name: str) -> list[str]:
    """Measure one row of the table: rounds in turn, the median of each number, and of the ratios within a run."""
    plain, cached = [], []
    for _ in range(ROUNDS):
        plain.append(run(name, cached=False))
        cached.append(run(name, cached=True))
    first = statistics.median(found[1] for found in plain + cached)
    without, with_cache = (statistics.median(found[2] for found in runs) for runs in (plain, cached))
    ratio, cached_ratio = (statistics.median(found[2] / found[1] for found in runs) for runs in (plain, cached))
    milliseconds = [f"{1e3 * seconds:.2f}" for seconds in (first, without, with_cache)]
    return [f"`{name}`", *milliseconds, f"{ratio:.2f}", f"{cached_ratio:.2f}"]


def main() -> None:
    """Measure and write the page."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run("wide_fc", cached=True)  # to warm up
    columns = ("recipe", "phase 1", "phase 2", "phase 2, cached", "phase 2 / phase 1", "cached / phase 1")
    table = markdown_table(columns, map(row, RECIPES))
    PAGE.write_text(
        f"""# What a step of phase 2 costs

The recipes on the digits (1,437 training samples, batches of 64) with their default sizes and `ExpressivityGuard(switch_at=0.5)`, with
and without `cache_features=True`, which is what the recipes have. A step is everything between the batch and the end of the
optimizer's step. Milliseconds, medians over the steps of a run and over {ROUNDS} runs of each kind in turn. Made by
`python benchmarks/phase_two.py` on {date.today()}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}.

{table}

Phase 2 has no backward pass through the trunk; with cached features it has no forward pass through it either. The ratios are medians
of ratios within a run. The pass over the training set that fills the cache, the certificate and the loss at the end of an epoch are
not in a step.
"""
    )
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
