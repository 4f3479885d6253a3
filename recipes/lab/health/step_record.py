"""``StepRecord``: one run of the study of steps in plain torch, with everything from which its findings follow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.run.outputs_on import outputs_on
from lightning_conv.health.step.optimizer_rules import UnknownStepError
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.recipes.lab.health.plain_step import PlainStep, operator_of
from lightning_conv.recipes.lab.health.study_runs import StudyRun, Task, optimizer_of

PILOT, SLOW = 10, 1e-3
"""Steps and rate after which AdamW's ratio at the start is read: before its first steps its preconditioner is not known."""

BAD = 100.0
"""Factor of the inputs of a bad batch."""

OVERFLOW = 65504.0
"""Largest number of float16; the outputs are multiplied by it and cast, as a scale that is far too large does."""


@dataclass
class StepRecord:
    """What was seen in a run.

    Attributes:
        ratio: Stability ratio at the start.
        rate: The learning rate at the start.
        losses: Training loss of every step, at the weights before it; the last one may not be finite.
        norms: Norm of the gradient of every step.
        probes: (step, loss of the probe) of every measurement.
        readings: (step, lower, upper) of every stability ratio.
        input_not_finite: Whether the inputs of the last batch were not finite.
        end: Loss of the training set at the end; NaN: not finite.
    """

    ratio: float
    rate: float
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    probes: list[tuple[int, float]] = field(default_factory=list)
    readings: list[tuple[int, float, float]] = field(default_factory=list)
    input_not_finite: bool = False
    end: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Return the record in the types of JSON; numbers have seven digits, and what is not finite is None."""
        content = dict(vars(self))
        content["losses"], content["norms"] = ([_short(each) for each in content[name]] for name in ("losses", "norms"))
        content["probes"] = [(step, _short(loss)) for step, loss in self.probes]
        content["readings"] = [(step, _short(lower), _short(upper)) for step, lower, upper in self.readings]
        return content | {"end": _short(self.end)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> StepRecord:
        """Return what ``to_json`` wrote; numbers that were not finite are NaN now."""
        known = dict(content)
        for name in ("losses", "norms"):
            known[name] = [_number(each) for each in content[name]]
        known["probes"] = [(step, _number(loss)) for step, loss in content["probes"]]
        known["readings"] = [(step, lower, upper) for step, lower, upper in content["readings"]]
        return cls(**known | {"end": _number(content["end"])})


def record_run(run: StudyRun, *, rate: float | None = None, measured: bool = True) -> StepRecord:
    """Train one run; it ends with the first loss that is not finite.

    Args:
        run: The run.
        rate: A learning rate in place of that of its ratio.
        measured: Whether the stability ratio is measured in the course of it.

    Cost: 0.3 to 2 s.
    """
    task = Task.of(run)
    operator = operator_of(task.net, probe_of(run, task)[0])
    at_one = ratio_at_start(run, task, operator)
    record = StepRecord(run.ratio if rate is None else at_one * rate, run.ratio / at_one if rate is None else rate)
    optimizer = optimizer_of(run, task.net, record.rate)
    measure = partial(_measure, record, task, operator, probe_of(run, task), optimizer)
    vector = measure(0, None) if measured else None
    for step, (rows, inputs, targets) in enumerate(batches_of(run, task)):
        inputs, targets = _injected(run, step, rows, inputs, targets, task)
        optimizer.param_groups[0]["lr"] = run.rate_at(step + 1, record.rate)
        task.net.train()
        optimizer.zero_grad()
        outputs = task.net(inputs)
        if run.cause == "overflow" and step >= run.at:
            outputs = (outputs * OVERFLOW).half().float() / OVERFLOW
        loss = task.loss(outputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.get_total_norm([each.grad for each in task.net.parameters() if each.grad is not None])
        record.losses.append(loss.item())
        record.norms.append(norm.item())
        if not math.isfinite(record.losses[-1]):
            record.input_not_finite = not bool(torch.isfinite(inputs).all())
            return record
        optimizer.step()
        if measured and (step + 1) % run.size.every == 0:
            vector = measure(step + 1, vector)
    with torch.no_grad():
        record.end = float(task.loss(task.net(task.inputs), task.targets))
    return record


def ratio_at_start(run: StudyRun, task: Task, operator: NTKOperator) -> float:
    """Return the stability ratio at the start for the learning rate 1.

    For AdamW it is that after ``PILOT`` steps at the rate ``SLOW``.

    Args:
        run: The run.
        task: Its network and samples; the weights and buffers are unchanged afterwards.
        operator: Of the network on its probe.
    """
    kept = {name: each.clone() for name, each in task.net.state_dict().items()}
    adaptive = run.optimizer == "adamw"
    optimizer = optimizer_of(run, task.net, SLOW)
    task.net.train()
    for _, inputs, targets in islice(batches_of(run, task), PILOT if adaptive else 0):
        optimizer.zero_grad()
        task.loss(task.net(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    inputs, targets = probe_of(run, task)
    reading, _ = PlainStep(task.net, operator, inputs, lambda u: task.loss(u, like(targets, u)), optimizer).ratio(
        0, None
    )
    assert reading is not None
    task.net.load_state_dict(kept)
    optimizer.zero_grad()
    return reading.lower / SLOW


def batches_of(run: StudyRun, task: Task) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the numbers, inputs and targets of the samples of every step; the order follows from the seed."""
    size, generator = run.size, torch.Generator().manual_seed(run.seed)
    whole = torch.arange(len(task.inputs))
    per_pass = 1 if run.full_batch else len(whole) // size.batch
    for step in range(size.steps):
        if step % per_pass == 0:
            order = whole if run.full_batch else torch.randperm(len(whole), generator=generator)
        count = len(whole) if run.full_batch else size.batch
        rows = order[(step % per_pass) * count :][:count]
        yield rows, task.inputs[rows], task.targets[rows]


def probe_of(run: StudyRun, task: Task) -> tuple[Tensor, Tensor]:
    """Return the samples of the probe: all of a run with full batches."""
    size = len(task.inputs) if run.full_batch and run.network == "mlp" else run.size.probe
    return task.inputs[:size], task.targets[:size]


def like(targets: Tensor, outputs: Tensor) -> Tensor:
    """Return targets of squared loss in the type of the outputs, and labels as they are."""
    return targets.to(outputs) if targets.is_floating_point() else targets


def _injected(
    run: StudyRun, step: int, rows: Tensor, inputs: Tensor, targets: Tensor, task: Task
) -> tuple[Tensor, Tensor]:
    """Return the batch with what is done to the run."""
    if run.cause == "bad batch" and step == run.at:
        return BAD * inputs, targets
    if step < run.at:
        return inputs, targets
    if run.cause == "wrong labels":
        order = torch.randperm(len(task.targets), generator=torch.Generator().manual_seed(run.seed + 1))
        return inputs, task.targets[order[rows]]
    if run.cause == "NaN in the data":
        inputs = inputs.clone()
        inputs[0] = math.nan
    return inputs, targets


def _measure(
    record: StepRecord,
    task: Task,
    operator: NTKOperator,
    probe: tuple[Tensor, Tensor],
    optimizer: Optimizer,
    step: int,
    vector: Tensor | None,
) -> Tensor | None:
    inputs, targets = probe
    try:
        now = PlainStep(task.net, operator, inputs, lambda u: task.loss(u, like(targets, u)), optimizer)
    except UnknownStepError:
        outputs = outputs_on(task.net, inputs, "frozen")[0]
        record.probes.append((step, float(task.loss(outputs, like(targets, outputs)))))
        return vector
    record.probes.append((step, float(now.loss(now.outputs))))
    reading, vector = now.ratio(step, vector)
    if reading is not None and math.isfinite(reading.upper):
        record.readings.append((step, reading.lower, reading.upper))
    return vector


def _short(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
