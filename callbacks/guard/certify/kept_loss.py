"""``KeptLoss``: the loss of some batches as a function of the outputs, kept from the switch and compared as phase 2 goes on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.checks import Check
from lightning_conv.callbacks.guard.certify.copies import in_eval_mode
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.call import StepCall
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.losses.of_outputs import Point, difference, settings
from lightning_conv.networks.undisturbed import without_fused_attention

FEW = 16  # samples in each of two batches, drawn at random


class KeptLoss:
    """Compares the training step's loss with what it was at the switch: targets may be remade after an epoch, a term may come and go.

    Each rank compares its own copy of the module.

    Args:
        view: The run.
    """

    def __init__(self, view: GuardView) -> None:
        self._view = view
        self._points: list[list[Point]] = []  # of each batch

    def keep(self) -> None:
        """Evaluate the loss at the present outputs, at random ones, and at some where it is small."""
        self._points = []
        with attempted(Exception), without_fused_attention():  # the step is any code of the user's
            for call in self._calls():
                found = [each for each in settings(call, call.observe().outputs) if each.finite]
                self._points.append([found[k] for k in sorted({0, len(found) // 3, len(found) - 1})] if found else [])

    def compare(self) -> list[Check]:
        """Return whether the loss is another function of the outputs now. All ranks call it together."""
        found = self._view.ranks.gather(self._difference)
        return [Check("same loss to the end", held, said) for held, said in found if said][:1]

    def _difference(self) -> tuple[bool | None, str]:
        with attempted(Exception) as attempt, without_fused_attention():
            for points, call in zip(self._points, self._calls(), strict=False):

                def now(u: Tensor, call: StepCall = call, points: list[Point] = points) -> Tensor:
                    return call(u.to(points[0].outputs))

                if points and (apart := difference(points, now)):
                    epoch = self._view.trainer.current_epoch
                    return False, f"the loss of the training step changes during the run ({apart}, in epoch {epoch})"
        return (
            (None, f"the training step could not be run on a copy: {attempt.reason}") if attempt.failed else (True, "")
        )

    def _calls(self) -> Iterator[StepCall]:
        data, twin = self._view.data, in_eval_mode(self._view)
        chosen = torch.randperm(data.size, generator=torch.Generator().manual_seed(1)).tolist()
        for number, some in enumerate([chosen[:FEW], chosen[-FEW:]]):
            yield StepCall(twin, self._view.head_name, data.batch_of(some), number)
