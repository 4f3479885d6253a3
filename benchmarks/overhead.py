"""Measure the cost of the monitors: the recipe with and without them, in turn; write docs/results/overhead.md."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from datetime import date
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import SimpleProfiler
from ntk_bench.calibration import processor

from lightning_conv.recipes import DigitsDataModule, WideFC
from lightning_conv.reporting.markdown import markdown_table

EPOCHS = 30
ROUNDS = 4
PAGE = Path(__file__).parent.parent / "docs" / "results" / "overhead.md"


def run(diagnostics: bool) -> tuple[float, float, float]:
    """Measure one run without guard, logger and checkpoints: wall time, and the monitors' time, first and last apart."""
    pl.seed_everything(0, verbose=False)
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    profiler = SimpleProfiler()
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="auto", devices=1, limit_val_batches=0, profiler=profiler, **options
    )
    start = time.perf_counter()
    trainer.fit(WideFC(guard=False, diagnostics=diagnostics), DigitsDataModule())
    wall = time.perf_counter() - start
    spent = {"on_train_batch_end": 0.0, "on_train_start": 0.0, "on_train_end": 0.0}
    for action, durations in profiler.recorded_durations.items():
        hook = action.rpartition(".")[2]
        if hook in spent and ("LambdaMin" in action or "KernelStability" in action):
            spent[hook] += sum(durations)
    return wall, spent["on_train_batch_end"], spent["on_train_start"] + spent["on_train_end"]


def main() -> None:
    """Run one pair to warm up, then the counted pairs."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run(True), run(False)
    pairs = [(run(True), run(False)) for _ in range(ROUNDS)]
    ratios = [watched[0] / plain[0] for watched, plain in pairs]
    plain = statistics.median(pair[1][0] for pair in pairs)
    between = statistics.median(watched[1] / watched[0] for watched, _ in pairs)
    ends = statistics.median(watched[2] for watched, _ in pairs)
    rows = [
        ("run without monitors, median", f"{plain:.1f} s"),
        (
            "the monitors' own time between the first and the last measurement, share of the run, median",
            f"{100 * between:.1f} %",
        ),
        ("first and last measurement together, outside the budget, median", f"{ends:.2f} s"),
        (
            "ratio of wall times: median (smallest, largest)",
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})",
        ),
    ]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(
        f"""# What the monitors cost

`WideFC` on the digits, {EPOCHS} epochs, with `KernelStability` and `LambdaMin` at their defaults (128 samples, `max_overhead=0.03`) against
the same run without. Made by `python benchmarks/overhead.py` on {date.today()}, {processor()}, {torch.get_num_threads()} threads, torch
{torch.__version__}. {ROUNDS} pairs, in turn.

{markdown_table(("quantity", "value"), rows)}

The own time is what Lightning's SimpleProfiler books on the monitors' hooks. The ratio of whole runs also holds the machine's unrest.
"""
    )
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
