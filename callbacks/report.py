"""``ConvergenceReport``: what was found of a run, its charts and its verdicts as pages beside its logs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_conv.arguments import require_truth, require_type
from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria
from lightning_conv.callbacks.health.callback import ConvergenceHealth
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.record_of_run import in_plain_words, record_of
from lightning_conv.callbacks.run.end_of_run import say_the_end
from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.callbacks.run.loggers.artifacts import picture_of
from lightning_conv.callbacks.run.loggers.folder import run_folder
from lightning_conv.callbacks.run.loggers.names import path_of
from lightning_conv.callbacks.run.loggers.sending import send_files, wants_picture
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.callbacks.run.series_keeper import SeriesKeeper
from lightning_conv.reporting.page.html_page import run_page
from lightning_conv.reporting.page.run_record import RunRecord
from lightning_conv.reporting.plain_words import plain_words_markdown
from lightning_conv.reporting.report import report_markdown

FIGURE_SECONDS = 0.4
"""Seconds that the figure of a network takes: 0.2 to 0.4 on one core of a server (2026)."""


class ConvergenceReport(SeriesKeeper):
    """Writes ``convergence.html``, ``convergence.md`` and ``convergence.json`` into the logger's folder when the fit ends.

    So it does when the fit ends in an error. They contain the findings of ``ConvergenceHealth`` in plain words, its audit of the labels if
    it was asked for one, the verdicts of ``ConvergenceCriteria`` (without it, of ``KernelStability`` alone), the assumptions that the run
    violates, and the last value of each scalar that the callbacks of this library logged. The place in the list of callbacks does not
    matter.

    The fit ends with a block in the terminal: the verdict on the run, the findings by severity with their steps, and the files. It is
    logged as Lightning logs: in colours on a terminal, plain in log files.

    The HTML file is one page for people, with a figure of the run and charts of what was logged: at most ``MOST`` points of each quantity
    are kept for them, also in checkpoints. It loads nothing from a network. An error in it is a warning, and the other files are written.

    The files are also sent to the loggers that store files: Weights & Biases, MLflow and Comet have them with the run, with its figure as
    ``convergence.png``, which a folder with a ``metrics.csv`` gets, too.

    Args:
        folder: where to write; None: the folder of the run (``run_folder``), which no other run of its loggers shares. Without a logger it
            is the trainer's ``default_root_dir``.
        name: of the files, without their endings.
        html: whether to write the HTML file.

    Raises:
        MisconfigurationException: One of them is of another type.

    Cost: 0.2 to 0.4 s for the figure in the HTML file at the end of the fit, for each optimizer (one core of a server, 2026). It is left
    out where the callbacks of the run would then have taken more than twice their ``max_overhead`` and more than 1.6 s; the page names the
    command that draws it. As ``convergence.png`` it takes as long again, and is left out in the same way. The rest takes milliseconds,
    and on a server what the network takes. When an epoch or a validation ends, the module's own values are read: 0.1 ms. In a
    checkpoint 32 kB for each quantity, at most.

    Example::

        trainer = Trainer(callbacks=[KernelStability(), LambdaMin(), ConvergenceCriteria(), ConvergenceReport()])
    """

    says_the_end = True
    """That the findings are shown here when the fit ends, with the files; ``ConvergenceHealth`` shows them where nothing else does."""

    def __init__(self, folder: str | None = None, name: str = "convergence", html: bool = True) -> None:
        super().__init__()
        try:
            require_type("folder", folder, (str, os.PathLike, type(None)), "a path, or None for the folder of the run")
            require_type("name", name, str, "the name of the files without an ending, such as 'convergence'")
            require_truth("html", html)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"ConvergenceReport: {error}") from error
        self.folder = folder
        self.name = name
        self.html = html
        self._of_run: Path | None = None
        self._begun = False  # whether the training has begun
        # Lightning asks for it at every hook.
        self._key = self._generate_state_key(folder=folder, name=name)

    @property
    @override
    def state_key(self) -> str:
        return self._key

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._of_run, self._begun = None, False
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._of_run = self.folder_of(trainer)

    def folder_of(self, trainer: pl.Trainer) -> Path:
        """Return the folder in which the files of this run are written, the same one on all ranks, which all call this.

        Args:
            trainer: Trainer of the run, in a fit.
        """
        if self._of_run is not None:
            return self._of_run
        found = (self.folder or run_folder(trainer)) if trainer.is_global_zero else ""
        return Path(Ranks(trainer).broadcast(str(found)))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._begun = True

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # This is later than on_train_end, in which the monitors measure for the last time.
        broken = [each.diverged_at for each in monitors_of(trainer, ConvergenceHealth) if each.diverged_at is not None]
        self._write(trainer, pl_module, f"diverged at step {min(broken)}" if broken else "completed")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # There must be no collective here: the other processes may be gone.
        stopped = isinstance(exception, (KeyboardInterrupt, SystemExit, SIGTERMException))
        # A run that is refused never begins; one may be stopped in its first measurement, before this callback's turn.
        if (self._begun or stopped) and (trainer.training or trainer.validating):
            self._write(trainer, pl_module, f"{'interrupted' if stopped else 'failed'} ({type(exception).__name__})")

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, how: str) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        files: dict[str, Path] = {}
        with guarded(None, "ConvergenceReport: nothing was written", expects=(OSError,)) as attempt:
            # Known since the beginning: where the other processes are gone they cannot be asked.
            folder = self._of_run or Path(self.folder or run_folder(trainer))
            folder.mkdir(parents=True, exist_ok=True)
            for monitor in monitors_of(trainer, ConvergenceCriteria):
                monitor.finish(trainer)  # its own on_fit_end may come later than this one
            record = record_of(trainer, pl_module, how, folder, self)
            named = {"report": folder / f"{self.name}.md", "record": folder / f"{self.name}.json"}
            text = report_markdown(
                "Convergence report",
                record.facts,
                record.criteria,
                record.metrics,
                steps=record.steps,
                words=self._words(trainer, record),
                labels=record.labels,
            )
            _write_whole(named["report"], text.encode("utf-8"))
            _write_whole(named["record"], record.to_json().encode("utf-8"))
            files = named
        shown = files
        if not attempt.failed and self.html:
            why_not = self._no_figure(trainer, folder)
            page = self._written("page", folder, ".html", lambda: run_page(record, no_figure=why_not).encode("utf-8"))
            files, shown = files | page, page | files
            if wants_picture(trainer) and self._affords(trainer, 2):
                for number, of in enumerate(record.optimizers):
                    ending = f"_{path_of(of).name}.png" if number else ".png"
                    what = f"picture of {of}" if number else "picture"
                    files |= self._written(what, folder, ending, partial(picture_of, record, of))
        send_files(trainer, files, trainer.global_step)
        if monitors_of(trainer, ConvergenceHealth):
            say_the_end(trainer, how, *in_plain_words(trainer), {what: str(path) for what, path in shown.items()})
        elif shown:
            rank_zero_info(f"ConvergenceReport: {', '.join(map(str, shown.values()))}")

    @staticmethod
    def _affords(trainer: pl.Trainer, figures: int) -> bool:
        """Return whether a run is long enough for so many figures of each network."""
        monitors = monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
        seconds = figures * FIGURE_SECONDS * len({each.optimizer for each in monitors})
        return all(each.schedule.allows_at_end(seconds, trainer.global_step) for each in monitors)

    def _no_figure(self, trainer: pl.Trainer, folder: Path) -> str:
        """Return why the figure is left out: it would take too much of a short run; empty: it is drawn."""
        if self._affords(trainer, 1):
            return ""
        monitors = monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
        seconds = FIGURE_SECONDS * len({each.optimizer for each in monitors})
        command = f"lightning-conv report {shlex.quote(str(folder))}"
        return f"The run was too short for a figure, which takes {seconds:.1f} s: {command} draws it."

    def _written(self, what: str, folder: Path, ending: str, content: Callable[[], bytes]) -> dict[str, Path]:
        """Write a file and return its path by what it is; nothing: it could not be written, which was said."""
        path = folder / f"{self.name}{ending}"
        with guarded(None, f"ConvergenceReport: {path.name} was not written", expects=(OSError,)) as attempt:
            _write_whole(path, content())
        return {} if attempt.failed else {what: path}

    @staticmethod
    def _words(trainer: pl.Trainer, record: RunRecord) -> str:
        """Return the section with the findings; empty: nothing judges the run."""
        judged = bool(monitors_of(trainer, ConvergenceHealth))
        return plain_words_markdown(record.findings, record.not_judged) if judged else ""


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, so that an interrupted run leaves no half of it."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
