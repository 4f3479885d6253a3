"""``networks_checked``: what the monitors of a run have begun to measure, network by network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as pl
from torch import Tensor

from lightning_conv.callbacks.check.run_check import CostCheck, NetworkCheck, ScaleCheck, TheoremCheck
from lightning_conv.callbacks.check.scale_checked import Target, scale_checked
from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria
from lightning_conv.callbacks.criteria.observer import step_violations
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, make_trackers
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.run.assumptions import violated
from lightning_conv.callbacks.run.budget import KERNELS, seconds_of_an_epoch
from lightning_conv.callbacks.run.data.sampling import training_samples
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.losses.loss_modules import LossFn
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.pass_time import time_pass
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.callbacks.run.violations import find_violations
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.observed.leaves import tensors_in


def networks_checked(trainer: pl.Trainer, target: Target | None = None) -> tuple[NetworkCheck, ...]:
    """Return what the monitors measure: one entry for all that share a kernel.

    Args:
        trainer: Trainer of the run, whose monitors have made their first measurement, or wait for a longer run.
        target: Ranks and device for which a measurement is predicted; None: it is not.
    """
    monitors = monitors_of(trainer, KernelMonitor)  # type: ignore[type-abstract]
    sharing: dict[int, list[KernelMonitor]] = {}
    for each in monitors:
        if each.kernel is not None:
            sharing.setdefault(id(each.kernel), []).append(each)
    return tuple(_network(trainer, peers, target) for peers in sharing.values())


def _network(trainer: pl.Trainer, peers: Sequence[KernelMonitor], target: Target | None) -> NetworkCheck:
    """Return what is known of one kernel."""
    kernel, loss_fn = peers[0].kernel, next((each.loss_fn for each in peers if each.loss_fn is not None), None)
    assert kernel is not None
    network, loss = kernel.run_network, kernel.loss(loss_fn)
    scale, missing = _scale(trainer, kernel, target)
    observed = network.observed
    return NetworkCheck(
        optimizer=peers[0].optimizer,
        callbacks=tuple(type(each).__name__ for each in peers),
        call="called as the Probe says" if observed is None else observed.words,
        call_source="given" if observed is None else "observed",
        inputs=_shapes(kernel.inputs),
        samples=kernel.samples,
        of=_set_size(trainer),
        numbers=None if kernel.numbers is None else tuple(kernel.numbers),
        n_outputs=kernel.n_outputs,
        outputs=kernel.probe.outputs,
        kernel=KERNELS[kernel.probe.outputs],
        weights=kernel.weights,
        targets=_targets(kernel.targets),
        loss=loss.words,
        loss_source=loss.source,
        cost=_cost(trainer, kernel),
        theorems=_theorems(trainer, kernel, peers, loss_fn),
        scale=scale,
        scale_missing=missing,
    )


def _scale(trainer: pl.Trainer, kernel: Measurement, target: Target | None) -> tuple[ScaleCheck | None, str]:
    """Return what a measurement would take on many ranks, or why that is not known."""
    if target is None:
        return None, ""
    try:
        return scale_checked(trainer, kernel, target), ""
    except ValueError as error:
        return None, str(error)


def _shapes(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the network is given, by name or position."""
    if isinstance(inputs, Tensor):
        return {"": tuple(inputs.shape)}
    return {".".join(map(str, place)): tuple(each.shape) for place, each in tensors_in(inputs)}


def _targets(targets: Tensor | None) -> str:
    if targets is None:
        return ""
    return f"{str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}"


def _set_size(trainer: pl.Trainer) -> int | None:
    """Return the number of training samples; None: they have no number."""
    with attempted(Exception):  # the data set is any code of the user's
        samples, _ = training_samples(trainer, hint="")
        return len(samples)  # type: ignore[arg-type]
    return None


def _cost(trainer: pl.Trainer, kernel: Measurement) -> CostCheck:
    """Return what measuring this kernel takes."""
    seconds = kernel.pass_seconds or time_pass(trainer, kernel, kernel.samples)[0]
    epochs, plan, schedule = trainer.max_epochs, kernel.plan, kernel.schedule
    return CostCheck(
        first=schedule.first_seconds,
        later=schedule.cost,
        waits=kernel.awaited,
        epoch=seconds_of_an_epoch(trainer, seconds, kernel.samples),
        epochs=None if epochs is None or epochs < 0 or math.isinf(epochs) else int(epochs),
        share=schedule.max_overhead,
        every_n_steps=schedule.every_n_steps,
        choice=kernel.choice,
        memory=None if plan is None else plan.bytes,
        memory_allowed=None if plan is None else plan.max_memory,
    )


def _theorems(
    trainer: pl.Trainer, kernel: Measurement, peers: Sequence[KernelMonitor], loss_fn: LossFn | None
) -> tuple[TheoremCheck, ...]:
    """Return for each paper why its theorem is not about the run: what the run's criteria say, or would say."""
    judge = next((each for each in peers if isinstance(each, ConvergenceCriteria)), None)
    if judge is not None and judge.criteria:
        trackers, violations = list(judge.trackers.values()), judge.violations
        judged = judge.by_paper(trainer)
    else:
        trackers, judged = make_trackers("auto", {"radius": None}), {}
        run = RunView(trainer, kernel, loss_fn)
        violations = [*find_violations(run), *step_violations(run)]

    def reasons(tracker: CriteriaTracker) -> tuple[str, ...]:
        found = violated(violations, tracker.assumes)
        criteria = judged.get(tracker.name, [])
        if not found and criteria and all(each.verdict == "not applicable" for each in criteria):
            found = "; ".join(each.reason for each in criteria)
        return tuple(dict.fromkeys(found.split("; "))) if found else ()

    return tuple(TheoremCheck(paper=each.name, source=each.source, reasons=reasons(each)) for each in trackers)
