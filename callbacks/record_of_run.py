"""``record_of``: what is known of a run at its end, as its pages and its terminal block tell it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl

from lightning_conv import __version__
from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria
from lightning_conv.callbacks.health.callback import ConvergenceHealth
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.monitors.kernel_stability import KernelStability
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.run_settings import seconds_of_run, settings_of_run
from lightning_conv.callbacks.run.series_keeper import SeriesKeeper
from lightning_conv.health.finding import Finding
from lightning_conv.reporting.page.run_record import RunRecord
from lightning_conv.reporting.tags import GROUPS, LOSS
from lightning_conv.theory.criterion import Criterion

NO_HEALTH = (
    "The run had no ConvergenceHealth, which says in sentences what it is doing; ConvergenceDiagnostics has one."
)


def record_of(
    trainer: pl.Trainer, pl_module: pl.LightningModule, how: str, folder: Path, kept: SeriesKeeper
) -> RunRecord:
    """Return what is known of the run.

    Args:
        trainer: Trainer of the run.
        pl_module: Its module.
        how: How it has ended.
        folder: Where its files are.
        kept: Has the series that were logged.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(GROUPS)}
    monitors = monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
    known = {name: step for monitor in monitors for name, step in monitor.steps_of_values.items()}
    series = dict(kept.series)
    for health in monitors_of(trainer, ConvergenceHealth)[:1]:  # the losses are those of the whole training step
        with attempted(Exception):  # a device that has failed does not give them
            series[LOSS] = health.losses_so_far(trainer)
    findings, reasons = in_plain_words(trainer)
    return RunRecord(
        name="/".join(folder.absolute().parts[-2:]),
        facts=_facts(trainer, pl_module, how),
        findings=findings,
        not_judged=reasons,
        criteria=find_criteria(trainer),
        metrics=metrics,
        steps={name: step for name, step in known.items() if name in metrics},
        series=series,
        shares=kept.shares,
        settings=settings_of_run(trainer, pl_module),
        seconds=seconds_of_run(trainer),
        optimizers=list(dict.fromkeys(each.optimizer for each in monitors)) or [""],
        labels=_labels(trainer),
        missing=[] if monitors_of(trainer, ConvergenceHealth) else [NO_HEALTH],
    )


def in_plain_words(trainer: pl.Trainer) -> tuple[list[Finding], dict[str, list[str]]]:
    """Return the findings of ``ConvergenceHealth``, for the network of each optimizer, and what was not judged, by the reason.

    Args:
        trainer: Trainer of the run.
    """
    findings: list[Finding] = []
    reasons: dict[str, list[str]] = {}
    for monitor in monitors_of(trainer, ConvergenceHealth):
        of = f"{monitor.optimizer}: " if monitor.optimizer else ""
        findings += [replace(each, sentence=f"{of}{each.sentence}") for each in monitor.findings]
        for reason, names in monitor.not_judged.items():
            reasons.setdefault(reason, []).extend(f"{of}{name}" for name in names)
    return findings, reasons


def _labels(trainer: pl.Trainer) -> str:
    """Return the section with the audits of labels; empty: there is none."""
    audits = {
        each.optimizer: each.labels.markdown
        for each in monitors_of(trainer, ConvergenceHealth)
        if each.labels is not None and each.labels.audit is not None
    }
    return "\n\n".join(f"## Labels{f' of {name}' if name else ''}\n\n{table}" for name, table in audits.items())


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
        facts["assumptions of theorems that the run does not meet"] = "; ".join(dict.fromkeys(violated))
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
