"""``LossesSeen``: the training losses of a run, step by step, and the first value that was not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_conv.health.findings.of_units import NotFinite
from lightning_conv.health.step.course import LossCourse
from lightning_conv.health.step.progress import WINDOW, Progress, progress_of
from lightning_conv.networks.observed.leaves import tensors_in
from lightning_conv.reporting.series import Series

MOST = 4096
"""Losses that wait at most."""

AT_ONCE = 32
"""Losses on an accelerator that are fetched together: fetching one makes the host wait for the device."""


class LossesSeen:
    """Follows what the training step returns as its loss.

    Attributes:
        course: The losses so far; None: none was seen.
        not_finite: The first value of the run that was seen not to be finite; None: all were.
        series: The losses by step, thinned.
    """

    def __init__(self) -> None:
        self.course: LossCourse | None = None
        self.not_finite: NotFinite | None = None
        self.series = Series()
        self._begun: list[float] = []  # the first ones of the run
        self._values: list[float] = []  # losses that wait, on the CPU
        self._tensors: list[Tensor] = []  # and on an accelerator

    def note(self, outputs: Any) -> bool:
        """Note the loss of a batch, and return whether to ``fetch`` now: one is not finite, or many wait.

        Args:
            outputs: What the training step has returned, as Lightning hands it on.

        Cost: a microsecond, in every step; on an accelerator losses are fetched ``AT_ONCE`` at a time.
        """
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1 or self.not_finite is not None:
            return False
        if loss.is_cpu:
            value = loss.item()
            self._values.append(value)
            return value - value != 0.0 or len(self._values) >= MOST  # infinity minus infinity is NaN
        self._tensors.append(loss.detach())
        return len(self._tensors) >= AT_ONCE

    def fetch(self, step: int, batches: int = 1, batch: Any = None) -> bool:
        """Look at the losses that wait, and return whether the first one that is not finite is among them.

        Args:
            step: Optimizer steps done after the last one.
            batches: Number of batches in a step.
            batch: The last batch; None: it is not there any more.
        """
        values = [*self._values, *(float(each) for each in self._tensors)]
        self._values, self._tensors = [], []
        if not values or self.not_finite is not None:
            return False
        begun = step - (len(values) - 1) // batches
        self.course = (self.course or LossCourse.begin(begun, values[0])).through(values, step, batches)
        self._begun += values[: WINDOW - len(self._begun)]
        self.series.extend((begun + number // batches, value) for number, value in enumerate(values))
        broken = next((number for number, value in enumerate(values) if not math.isfinite(value)), None)
        if broken is None:
            return False
        last = broken == len(values) - 1
        of_batch = _not_finite_in(batch) if last and batch is not None else None
        kind: Literal["input", "loss"] = "loss" if of_batch is None else "input"
        word: Literal["NaN", "infinite"] = "NaN" if math.isnan(values[broken]) else "infinite"
        at = step - (len(values) - 1 - broken) // batches
        self.not_finite = NotFinite(kind=kind, step=at, moment="before", value=of_batch or word)
        return True

    @property
    def progress(self) -> Progress | None:
        """Return the losses at both ends of the run; None: there are too few."""
        return None if self.course is None else progress_of(self._begun, self.course.last, self.course.step)

    def look_at_weights(self, module: nn.Module, step: int) -> None:
        """Look for weights and buffers that are not finite, if no loss was.

        Args:
            module: The module.
            step: Optimizer steps done.

        Cost: all weights are read once.
        """
        if self.not_finite is not None:
            return
        kinds: tuple[tuple[Literal["weight", "buffer"], Any], ...] = (
            ("weight", module.named_parameters()),
            ("buffer", module.named_buffers()),
        )
        for kind, named in kinds:
            for name, tensor in named:
                if (value := _broken(tensor)) is not None:
                    self.not_finite = NotFinite(kind=kind, name=name, step=step, moment="after", value=value)
                    return

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        return {
            "waiting": [*self._values, *(float(each) for each in self._tensors)],
            "course": None if self.course is None else vars(self.course),
            "not_finite": None if self.not_finite is None else vars(self.not_finite),
            "series": self.series.state_dict(),
            "begun": list(self._begun),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        course, first = state.get("course"), state.get("not_finite")
        self._values, self._tensors = list(state.get("waiting", ())), []
        self.course = None if course is None else LossCourse(**course)
        self.not_finite = None if first is None else NotFinite(**first)
        self.series = Series.from_state(state["series"]) if "series" in state else Series()
        self._begun = list(state.get("begun", ()))


def _not_finite_in(batch: Any) -> Literal["NaN", "infinite"] | None:
    return next((value for _, tensor in tensors_in(batch) if (value := _broken(tensor)) is not None), None)


@torch.no_grad()
def _broken(tensor: Tensor) -> Literal["NaN", "infinite"] | None:
    """Return what of a tensor is not finite; None: everything is."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout != torch.strided:
        return None
    if tensor.device.type == "meta" or not tensor.numel() or bool(torch.isfinite(tensor).all()):
        return None
    return "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
