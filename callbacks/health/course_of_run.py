"""``CourseOfRun``: the losses of the probe and the stability ratios of one run, and what they say together."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.health.losses_seen import LossesSeen
from lightning_conv.callbacks.health.start_of_run import StartOfRun
from lightning_conv.callbacks.health.step_of_run import NoStepError, StepOfRun, optimizer_of
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_losses import findings_of_losses
from lightning_conv.health.findings.of_step import SAFE, SAFE_MOMENTUM, of_small_batches
from lightning_conv.health.step.above_start import AboveStart
from lightning_conv.health.step.course import LossCourse, StabilityCourse
from lightning_conv.health.step.optimizer_rules import UnknownStepError, adapts, common_rate, has_momentum, largest_rate
from lightning_conv.networks.batch_norm import has_batch_norm


class CourseOfRun:
    """Follows one run.

    Args:
        losses: The training losses.
        start: What the run began with.
        undecided: What could not be judged, and why, which is noted here.

    Attributes:
        probe: The losses of the probe; None: none is known.
        ratios: The stability ratios; None: none is known.
        statistical: Whether the ratios are those of a part of the data, as with mini-batches.
    """

    def __init__(self, losses: LossesSeen, start: StartOfRun, undecided: dict[str, str]) -> None:
        self._losses, self._start, self._undecided = losses, start, undecided
        self.probe: LossCourse | None = None
        self.ratios: StabilityCourse | None = None
        self.statistical = False
        self._above: AboveStart | None = None  # see ``_follows_start``
        self._rate: float | None = None
        self._optimizer: weakref.ref[Optimizer] | None = None  # its rate may be raised between two measurements
        self._safe = SAFE_MOMENTUM
        self._vector: Tensor | None = None
        self._samples: tuple[int, int] | None = None  # of the probe, and of a step

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_optimizer": None}  # weak references are neither copied nor pickled

    def read_loss(self, run: RunView) -> float | None:
        """Return the loss on the probe in eval mode, and add it to its course; None: it is not known, which is noted.

        Args:
            run: The run at this moment.
        """
        if run.loss_unknown or run.loss_targets is None:
            self._undecided["loss"] = run.loss_unknown or "no targets are known"
            return None
        loss = run.loss_now()
        if has_batch_norm(run.network) and run.measurement.probe.batch_norm == "eval":
            return loss  # running statistics lag behind: this loss may rise in a run that is well
        if self.probe is None:
            self.probe = LossCourse.begin(run.step, loss)
            self._above = AboveStart.begin(run.step, loss) if _follows_start(run) else None
        elif run.step > self.probe.step:
            self.probe = self.probe.then(run.step, loss)
            self._above = None if self._above is None else self._above.then(run.step, loss)
        return loss

    def read_ratio(self, run: RunView) -> StepOfRun | None:
        """Read the stability ratio and return the next step; None: nothing can be said of it, which is noted.

        Args:
            run: The run at this moment.
        """
        self._start.look_at_curvature(run)
        if self._start.downward_since is not None:
            self._undecided["stability"] = "the loss curves downward in the outputs of every sample"
            return None
        try:
            step = StepOfRun.of(run)
            reading, self._vector = step.stability(self._vector)
        except (NoStepError, UnknownStepError) as error:
            self._undecided["stability"] = str(error)
            return None
        optimizer = optimizer_of(step.run)
        self._rate, self._optimizer = common_rate(optimizer), weakref.ref(optimizer)
        self._safe = SAFE_MOMENTUM if has_momentum(optimizer) else SAFE
        self._samples = None if run.step_samples is None else (run.samples, run.step_samples)
        if self.ratios is None:
            self.ratios = StabilityCourse.begin(reading)
        elif reading.step > self.ratios.now.step:
            self.ratios = self.ratios.then(reading)
        return step

    @property
    def findings(self) -> list[Finding]:
        """Return what the losses say, with the stability ratios beside them."""
        optimizer = None if self._optimizer is None else self._optimizer()
        said = findings_of_losses(
            self.ratios,
            self.probe,
            self._losses.course,
            rate=self._rate,
            largest_rate=None if optimizer is None else largest_rate(optimizer),
            safe=self._safe,
            statistical=self.statistical,
            above=self._above,
        )
        if self._samples is not None:
            said = [of_small_batches(each, *self._samples) for each in said]
        return [*self._start.descent(self.probe or self._losses.course), *said]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        return {
            "probe": None if self.probe is None else asdict(self.probe),
            "ratios": None if self.ratios is None else self.ratios.state_dict(),
            "rate": self._rate,
            "safe": self._safe,
            "samples": self._samples,
            "vector": None if self._vector is None else self._vector.cpu(),
            "statistical": self.statistical,
            "above": None if self._above is None else asdict(self._above),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.probe = None if state["probe"] is None else LossCourse(**state["probe"])
        self.ratios = None if state["ratios"] is None else StabilityCourse.from_state(state["ratios"])
        self._rate, self._vector, self.statistical = state["rate"], state["vector"], state["statistical"]
        self._safe = state.get("safe", SAFE_MOMENTUM)
        samples = state.get("samples")
        self._samples = None if samples is None else (int(samples[0]), int(samples[1]))
        above = state.get("above")
        self._above = None if above is None else AboveStart(**above)


def _follows_start(run: RunView) -> bool:
    """Return whether a loss that stays above its start is named.

    That is where no ratio is known before the first steps, so that they cannot be named as the cause. With several optimizers, as in a
    GAN, the loss of one may stay above its start in a run that is well.
    """
    optimizers = run.trainer.optimizers
    return len(optimizers) == 1 and adapts(optimizers[0])
