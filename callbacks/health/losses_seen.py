"""``LossesSeen``: the training losses of a run, step by step, and the first value that was not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_conv.health.course import LossCourse
from lightning_conv.health.finding_of_units import NotFinite
from lightning_conv.networks.observed.leaves import tensors_in

AT_ONCE = 32
"""Losses on an accelerator that are fetched together: fetching one makes the host wait for the device."""


class LossesSeen:
    """Follows what the training step returns as its loss.

    Attributes:
        course: The losses so far, each the mean over ``AT_ONCE`` neighbours at most; None: none was seen.
        not_finite: The first value of the run that was seen not to be finite; None: all were.
    """

    def __init__(self) -> None:
        self.course: LossCourse | None = None
        self.not_finite: NotFinite | None = None
        self._waiting: list[tuple[int, Tensor]] = []

    def note(self, step: int, outputs: Any, batch: Any) -> bool:
        """Note the loss of a batch, and return whether it is the first one that is not finite.

        Args:
            step: Optimizer steps done after it.
            outputs: What the training step has returned, as Lightning hands it on.
            batch: The batch.

        Cost: half a microsecond on the CPU; elsewhere losses are fetched ``AT_ONCE`` at a time.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1 or self.not_finite is not None:
            return False
        self._waiting.append((step, loss.detach()))
        if len(self._waiting) < (1 if loss.device.type == "cpu" else AT_ONCE):
            return False
        return self.fetch(batch)

    def fetch(self, batch: Any = None) -> bool:
        """Look at the losses that wait, and return whether there is the first one among them that is not finite.

        Args:
            batch: The last batch; None: it is not there any more.
        """
        waiting, self._waiting = self._waiting, []
        for number, (step, loss) in enumerate(waiting):
            value = float(loss)
            if self.course is None:
                self.course = LossCourse.begin(step, value)
            elif step > self.course.step:
                self.course = self.course.then(step, value)
            if not math.isfinite(value):
                last = number == len(waiting) - 1
                broken = None if batch is None or not last else _not_finite_in(batch)
                kind: Literal["input", "loss"] = "loss" if broken is None else "input"
                word: Literal["NaN", "infinite"] = "NaN" if math.isnan(value) else "infinite"
                self.not_finite = NotFinite(kind=kind, step=step, moment="before", value=broken or word)
                return True
        return False

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
        self.fetch()
        return {
            "course": None if self.course is None else vars(self.course),
            "not_finite": None if self.not_finite is None else vars(self.not_finite),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        course, first = state.get("course"), state.get("not_finite")
        self.course = None if course is None else LossCourse(**course)
        self.not_finite = None if first is None else NotFinite(**first)


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
