"""One pair of runs, without and with the diagnostics, and what the diagnostics did."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_conv.callbacks import ConvergenceDiagnostics
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.networks.inputs import sample_count
from overhead_bench.runs import Case, fit, long_runs, short_runs


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
        monitors = callbacks_of(trainer, KernelMonitor)
        kernel = next((each._kernel for each in monitors if each._kernel is not None), None)
        if kernel is not None:
            self.first = kernel.schedule.first_seconds
            self.words = f"{kernel.probe.outputs}, {sample_count(kernel.inputs)} samples, {kernel.precision}"
            if kernel.awaited:
                self.words = f"nothing: it would take {kernel.awaited:.1f} s"


@dataclass(frozen=True)
class Took:
    """What one run took, and what the diagnostics did in it."""

    seconds: float
    of_processor: float
    measurements: int = 0
    first: float = 0.0
    chosen: str = ""


def took(kind: str, name: str, epochs: int | None, watched: bool) -> Took | str:
    """Make one run; a string: why it ends in an error.

    Args:
        kind: "long" or "short".
        name: Name of the run.
        epochs: For how many; None: as the case says.
        watched: Whether with the diagnostics.
    """
    bounds, chosen = Bounds(), Chosen()
    options = {} if epochs is None else {"max_epochs": epochs}
    quiet()
    try:
        with tempfile.TemporaryDirectory() as folder:
            loggers = [TensorBoardLogger(folder), bounds]
            # Also the plain run has a callback that does nothing in a step: Lightning's own calls of it are not ours.
            callbacks = [ConvergenceDiagnostics(), chosen] if watched else [chosen]
            ran = fit(case_of(kind, name), callbacks, logger=loggers, **options)
    except Exception as error:  # whatever a user would see
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return Took(ran.seconds, ran.of_processor, len(bounds.steps), chosen.first, chosen.words)


def case_of(kind: str, name: str) -> Case:
    """Return the case; any of the short runs can be made long."""
    known = short_runs()
    return known[name] if kind == "short" else long_runs().get(name) or known[name]


def in_turn(kind: str, name: str, epochs: int | None, number: int) -> Pair | str:
    """Make a run without and one with the diagnostics, one after the other; which is first changes from pair to pair.

    Args:
        kind: "long" or "short".
        name: Name of the run.
        epochs: For how many; None: as the case says.
        number: Number of the pair.
    """
    order = (True, False) if number % 2 else (False, True)
    found = {watched: took(kind, name, epochs, watched) for watched in order}
    return _pair(found[False], found[True])


class SharedCore:
    """Two processes that make a run without and one with the diagnostics at the same time, on one core, in turns of milliseconds.

    What else the machine does, and how fast it is just then, so acts on both alike: two cores of a virtual machine differ by a tenth.
    The clocks of a run are its own seconds of the processor, which are what it would take alone on the core, as it has one thread.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self._workers = [
            ProcessPoolExecutor(1, mp_context=context, initializer=on_core, initargs=(core,)) for _ in range(2)
        ]
        for each in [worker.submit(took, "short", "dict_batch", None, True) for worker in self._workers]:
            each.result()  # loads what is loaded once

    def __call__(self, kind: str, name: str, epochs: int | None, number: int) -> Pair | str:
        """Make a pair of runs; the arguments are those of ``in_turn``."""
        watched, plain = self._workers if number % 2 else reversed(self._workers)
        with_them = watched.submit(took_by_processor, kind, name, epochs, True)
        without = plain.submit(took_by_processor, kind, name, epochs, False)
        return _pair(without.result(), with_them.result())

    def close(self) -> None:
        """End both processes."""
        for worker in self._workers:
            worker.shutdown()


def on_core(core: int | None) -> None:
    """Stay on one core from now on; None: on whichever the system chooses, with one thread."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def took_by_processor(kind: str, name: str, epochs: int | None, watched: bool) -> Took | str:
    """Make one run whose clocks, also those by which the diagnostics keep their budget, are its own seconds of the processor.

    Args:
        kind: "long" or "short".
        name: Name of the run.
        epochs: For how many; None: as the case says.
        watched: Whether with the diagnostics.
    """
    with patch("time.perf_counter", time.process_time), patch("time.monotonic", time.process_time):
        return took(kind, name, epochs, watched)


def quiet() -> None:
    """Say nothing while a run is timed."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _pair(plain: Took | str, watched: Took | str) -> Pair | str:
    if isinstance(plain, str) or isinstance(watched, str):
        return plain if isinstance(plain, str) else str(watched)
    ratio = watched.of_processor / plain.of_processor
    return Pair(plain.seconds, watched.seconds, ratio, watched.measurements, watched.first, watched.chosen)


def epochs_for(case: Case, seconds: float) -> int:
    """Return how many epochs take so long on an idle core, from a run that is long enough to tell.

    Args:
        case: The run.
        seconds: Seconds of the processor.
    """
    epochs, taken = 2, fit(case, max_epochs=2).of_processor
    while taken < min(4.0, seconds):
        epochs *= 2 if taken > 1.0 else 4
        taken = fit(case, max_epochs=epochs).of_processor
    return max(epochs, math.ceil(1.25 * epochs * seconds / taken))
