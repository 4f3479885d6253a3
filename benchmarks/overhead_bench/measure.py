"""One pair of runs, without and with the diagnostics, and what the diagnostics did."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_conv.callbacks import ConvergenceDiagnostics
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.networks.inputs import sample_count
from overhead_bench.runs import Case, Ran, fit


@dataclass(frozen=True)
class Pair:
    """One run without and one with the diagnostics."""

    plain: float  # seconds
    watched: float
    of_processor: float  # ratio of the seconds of the processor
    measurements: int  # with bounds
    first: float  # seconds of the first measurement, finding the network included
    chosen: str  # what was measured

    @property
    def ratio(self) -> float:
        """Wall time with the diagnostics over that without."""
        return self.watched / self.plain

    @property
    def more(self) -> float:
        """Seconds more with the diagnostics."""
        return self.watched - self.plain


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


class Chosen(pl.Callback):
    """Notes what the monitors measure and what their first measurement took. All access to their insides is here."""

    first, words = 0.0, "nothing"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note it, while the measurement is there."""
        monitors = [each for each in trainer.callbacks if isinstance(each, KernelMonitor)]  # type: ignore[attr-defined]
        kernel = next((each._kernel for each in monitors if each._kernel is not None), None)
        if kernel is not None:
            self.first = kernel.schedule.first_seconds
            self.words = f"{kernel.probe.outputs}, {sample_count(kernel.inputs)} samples, {kernel.precision}"
            if kernel.awaited:
                self.words = f"nothing: it would take {kernel.awaited:.1f} s"


def pair(case: Case, epochs: int | None, *, watched_first: bool) -> Pair | str:
    """Run the case without and with the diagnostics; a string: why it does not run with them.

    Args:
        case: The run.
        epochs: For how many; None: as the case says.
        watched_first: Which of the two is made first.
    """
    options = {} if epochs is None else {"max_epochs": epochs}
    bounds, chosen = Bounds(), Chosen()

    def ran(watched: bool) -> Ran:
        with tempfile.TemporaryDirectory() as folder:
            loggers = [TensorBoardLogger(folder), bounds if watched else Bounds()]
            return fit(case, [ConvergenceDiagnostics(), chosen] if watched else [], logger=loggers, **options)

    try:
        found = {watched: ran(watched) for watched in (watched_first, not watched_first)}
    except Exception as error:  # whatever a user would see
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    plain, watched = found[False], found[True]
    of_processor = watched.of_processor / plain.of_processor
    return Pair(plain.seconds, watched.seconds, of_processor, len(bounds.steps), chosen.first, chosen.words)


def epochs_for(case: Case, seconds: float) -> int:
    """Return how many epochs take so long, from a run that is long enough to tell."""
    epochs, taken = 2, fit(case, max_epochs=2).seconds
    while taken < min(2.0, seconds):
        epochs *= 4
        taken = fit(case, max_epochs=epochs).seconds
    return max(epochs, math.ceil(1.15 * epochs * seconds / taken))
