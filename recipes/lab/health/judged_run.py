"""``judge_run``: what ``ConvergenceHealth`` says in a recorded run, measurement by measurement, and how the run ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeAlias

import torch

from lightning_conv.callbacks.health.losses_seen import LossesSeen
from lightning_conv.health.finding import LEVELS, Finding
from lightning_conv.health.findings.of_losses import findings_of_losses
from lightning_conv.health.step.above_start import AboveStart
from lightning_conv.health.step.course import BLOWN, RISEN, LossCourse, StabilityCourse, StabilityReading
from lightning_conv.recipes.lab.health.step_record import StepRecord
from lightning_conv.recipes.lab.health.study_runs import StudyRun

Said: TypeAlias = Literal["the step", "not the step", "open"]

SPIKE = 10.0
"""Gradient norm over the median of all before it from which on it counts as a spike."""

SETTLED = 10
"""Steps before which no spike is looked for."""


@dataclass(frozen=True)
class JudgedRun:
    """What was said of a run, and how it ended.

    Attributes:
        run: The run.
        record: What was seen in it.
        findings: (step, what was said of the losses) of every measurement and of the end.
    """

    run: StudyRun
    record: StepRecord
    findings: tuple[tuple[int, tuple[Finding, ...]], ...]

    @property
    def finite(self) -> bool:
        """Whether all losses and the weights of the end were finite."""
        return math.isfinite(self.record.losses[-1]) and math.isfinite(self.record.end)

    @property
    def lost(self) -> bool:
        """Whether it ended worse than it started, or not finite."""
        return not self.finite or self.record.end > self.record.losses[0]

    @property
    def ended_badly(self) -> bool:
        """Whether it ended worse than it started, was not finite, or its training loss passed ``BLOWN`` times its start."""
        return self.lost or max(self.record.losses) >= BLOWN * self.record.losses[0]

    @property
    def causes(self) -> list[Said]:
        """What was said of the cause of a rise, at every measurement at which one was said."""
        said = (cause_said(found) for _, found in self.findings)
        return [each for each in said if each is not None]

    def worst(self, name: str) -> int:
        """Return the number of the most severe level that a finding had; 0 if it was never made.

        Args:
            name: Of the finding.
        """
        return max((each.severity for _, found in self.findings for each in found if each.name == name), default=0)

    @property
    def advised(self) -> float | None:
        """The rate that was named or follows from the named factor, the first time that it was; None: never."""
        for _, found in self.findings:
            for each in found:
                if each.name == "stability" and each.severity >= LEVELS.index("warning"):
                    return self.record.rate * self.run.safe / each.value
        return None

    @property
    def loss_spiked(self) -> bool:
        """Whether the loss of the probe was ``RISEN`` times its minimum at some measurement, or not finite: the first baseline."""
        seen = [loss for _, loss in self.record.probes]
        least = math.inf
        for each in seen:
            if each >= RISEN * least or not math.isfinite(each):
                return True
            least = min(least, each)
        return not math.isfinite(self.record.losses[-1])

    @property
    def norm_spiked(self) -> bool:
        """Whether the norm of the gradient was ``SPIKE`` times its median before, or not finite: the second baseline."""
        norms = self.record.norms
        return any(
            not math.isfinite(norms[k]) or norms[k] > SPIKE * median(norms[:k]) for k in range(SETTLED, len(norms))
        ) or not all(math.isfinite(each) for each in norms)

    def ratio_at(self, step: int) -> float | None:
        """Return the stability ratio that was measured at a step; None: it was not."""
        return next((lower for at, lower, _ in self.record.readings if at == step), None)


def cause_said(findings: Sequence[Finding]) -> Said | None:
    """Return what is said of the cause of a rise of the loss; None: no rise is said.

    Args:
        findings: Those of one measurement.
    """
    for each in findings:
        if each.name == "stability" and "The loss rose" in each.sentence:
            return "the step"
        if each.name == "loss_rise" and "The loss rose" in each.sentence:
            return "not the step" if "the data, the labels and the numbers" in each.advice else "open"
    return None


def judge_run(run: StudyRun, record: StepRecord) -> JudgedRun:
    """Say what ``ConvergenceHealth`` says of a recorded run, by its own functions and in its own order.

    Args:
        run: The run.
        record: What was seen in it.
    """
    losses, seen = LossesSeen(), 0
    probe: LossCourse | None = None
    above: AboveStart | None = None
    ratios: StabilityCourse | None = None
    known = {
        step: StabilityReading(step, lower, upper, run.rate_at(step, record.rate))
        for step, lower, upper in record.readings
    }
    of_probe = dict(record.probes)
    rate = None if run.optimizer == "adamw" else record.rate
    statistical = not (run.full_batch and run.network == "mlp")
    said = []
    for step in sorted({*of_probe, len(record.losses)}):
        for value in record.losses[seen:step]:
            losses.note(torch.tensor(value))
        seen = step
        losses.fetch(step)
        if step in of_probe:
            loss = of_probe[step]
            probe = LossCourse.begin(step, loss) if probe is None else probe.then(step, loss)
            if run.optimizer == "adamw":  # as in ``CourseOfRun``
                above = AboveStart.begin(step, loss) if above is None else above.then(step, loss)
        if step in known:
            ratios = StabilityCourse.begin(known[step]) if ratios is None else ratios.then(known[step])
        now = run.rate_at(step, record.rate)
        found = findings_of_losses(
            ratios,
            probe,
            losses.course,
            rate=rate,
            largest_rate=now,
            safe=run.safe,
            statistical=statistical,
            above=above,
        )
        said.append((step, tuple(found)))
    return JudgedRun(run, record, tuple(said))
