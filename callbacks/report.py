"""``ConvergenceReport``: the verdicts and the last numbers of a run as a page beside its logs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_conv import __version__
from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria
from lightning_conv.callbacks.health.callback import ConvergenceHealth
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.monitors.kernel_stability import KernelStability
from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.callbacks.run.logging import GROUPS
from lightning_conv.health.finding import Finding
from lightning_conv.reporting.plain_words import plain_words_markdown
from lightning_conv.reporting.report import report_json, report_markdown
from lightning_conv.theory.criterion import Criterion


class ConvergenceReport(pl.Callback):
    """Writes ``convergence.md`` and ``convergence.json`` into the logger's folder when the fit ends, also when it ends in an error.

    They contain the findings of ``ConvergenceHealth`` in plain words, its audit of the labels if it was asked for one, the verdicts of
    ``ConvergenceCriteria`` (without it, of ``KernelStability`` alone), the assumptions that the run violates, and the last value of each
    scalar that the callbacks of this library logged. The place in the list of callbacks does not matter.

    Args:
        folder: where to write; None: the folder of the first logger, or without a logger the trainer's ``default_root_dir``.
        name: of the files, without their endings.

    Example::

        trainer = Trainer(callbacks=[KernelStability(), LambdaMin(), ConvergenceCriteria(), ConvergenceReport()])
    """

    def __init__(self, folder: str | None = None, name: str = "convergence") -> None:
        self.folder = folder
        self.name = name
        # Lightning asks for it at every hook.
        self._key = self._generate_state_key(folder=folder, name=name)

    @property
    @override
    def state_key(self) -> str:
        return self._key

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # This is later than on_train_end, in which the monitors measure for the last time.
        broken = [each.diverged_at for each in monitors_of(trainer, ConvergenceHealth) if each.diverged_at is not None]
        self._write(trainer, pl_module, f"diverged at step {min(broken)}" if broken else "completed")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # There must be no collective here: the other processes may be gone.
        if trainer.training or trainer.validating or trainer.sanity_checking:
            stopped = isinstance(exception, (KeyboardInterrupt, SystemExit, SIGTERMException))
            self._write(trainer, pl_module, f"{'interrupted' if stopped else 'failed'} ({type(exception).__name__})")

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, how: str) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        with guarded(None, "ConvergenceReport: nothing was written", expects=(OSError,)) as attempt:
            folder = self._folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            for monitor in monitors_of(trainer, ConvergenceCriteria):
                monitor.finish(trainer)  # its own on_fit_end may come later than this one
            criteria = find_criteria(trainer)
            facts = self._facts(trainer, pl_module, how)
            metrics = {
                name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(GROUPS)
            }
            page = folder / f"{self.name}.md"
            monitors = monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
            known = {name: step for monitor in monitors for name, step in monitor.steps_of_values.items()}
            steps = {name: step for name, step in known.items() if name in metrics}
            findings, words = self._in_plain_words(trainer)
            labels = self._labels(trainer)
            text = report_markdown(
                "Convergence report", facts, criteria, metrics, steps=steps, words=words, labels=labels
            )
            _write_whole(page, text)
            health = [each.to_json() for each in findings]
            _write_whole(folder / f"{self.name}.json", report_json(facts, criteria, metrics, health, steps))
        if not attempt.failed:
            rank_zero_info(f"ConvergenceReport: {page}")

    def _folder(self, trainer: pl.Trainer) -> Path:
        """Return the folder of the first logger that has one; ``trainer.log_dir`` would ask the other processes."""
        if self.folder is not None:
            return Path(self.folder)
        for logger in trainer.loggers:
            found = getattr(logger, "log_dir", None) or logger.save_dir
            if found:
                return Path(found)
        return Path(trainer.default_root_dir)

    @staticmethod
    def _in_plain_words(trainer: pl.Trainer) -> tuple[list[Finding], str]:
        """Return the findings of ``ConvergenceHealth``, for the network of each optimizer, and the section that says them."""
        monitors = monitors_of(trainer, ConvergenceHealth)
        findings: list[Finding] = []
        reasons: dict[str, list[str]] = {}
        for monitor in monitors:
            of = f"{monitor.optimizer}: " if monitor.optimizer else ""
            findings += [replace(each, sentence=f"{of}{each.sentence}") for each in monitor.findings]
            for reason, names in monitor.not_judged.items():
                reasons.setdefault(reason, []).extend(f"{of}{name}" for name in names)
        return findings, plain_words_markdown(findings, reasons) if monitors else ""

    @staticmethod
    def _labels(trainer: pl.Trainer) -> str:
        """Return the section with the audits of labels; empty: there is none."""
        audits = {
            each.optimizer: each.labels.markdown
            for each in monitors_of(trainer, ConvergenceHealth)
            if each.labels is not None and each.labels.audit is not None
        }
        return "\n\n".join(f"## Labels{f' of {name}' if name else ''}\n\n{table}" for name, table in audits.items())

    @staticmethod
    def _facts(trainer: pl.Trainer, pl_module: pl.LightningModule, how: str) -> dict[str, object]:
        facts: dict[str, object] = {
            "module": type(pl_module).__name__,
            "run": how,
            "optimizer steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "optimizer": ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers),
            "lightning_conv": __version__,
        }
        monitors = monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
        if named := [each.measured for each in monitors if each.optimizer]:
            facts["networks"] = "; ".join(dict.fromkeys(named))
        failed = [
            f"{each.optimizer}: {said}" if each.optimizer else said
            for each in {id(monitor.failures): monitor for monitor in monitors}.values()
            for said in each.failures.words
        ]
        failed += [each for monitor in monitors_of(trainer, ConvergenceCriteria) for each in monitor.left_out]
        if failed:
            facts["failed measurements"] = "; ".join(failed)
        violated = [each.reason for monitor in monitors_of(trainer, ConvergenceCriteria) for each in monitor.violations]
        if violated:
            facts["hypotheses that do not hold"] = "; ".join(dict.fromkeys(violated))
        return facts


def find_criteria(trainer: pl.Trainer) -> list[Criterion]:
    """Return the verdicts of the run's callbacks, for the network of each optimizer.

    Args:
        trainer: Trainer of the run.
    """
    found = [each for monitor in monitors_of(trainer, ConvergenceCriteria) for each in _named(monitor)]
    return found or [each for monitor in monitors_of(trainer, KernelStability) for each in _named(monitor)]


def _named(monitor: ConvergenceCriteria | KernelStability) -> list[Criterion]:
    """Return the verdicts of a monitor, with the name of the optimizer before theirs where the run has several."""
    of = f"{monitor.optimizer}/" if monitor.optimizer else ""
    return [replace(each, name=f"{of}{each.name}") for each in monitor.criteria]


def _write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, so that an interrupted run leaves no half of it."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
