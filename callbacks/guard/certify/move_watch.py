"""``MoveWatch``: whether anything but the optimizer's own step moves the head in phase 2."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.ranks import Ranks

ULPS = 64  # units of rounding by which a step may differ from its repetition, relative to the weight and to the move
BETWEEN = "something moved the head between two steps of the optimizer (a hook of the module, or a callback)"
BESIDE = "a step moves the head otherwise than the optimizer does (an optimizer_step of its own, or a hook)"


class MoveWatch:
    """Repeats some steps of the optimizer on a copy, and compares the head between steps bit for bit.

    The steps that are followed are those whose number in phase 2 is a power of two.

    Args:
        head: The head, in phase 2.
        ranks: Processes of the run, which call every method together.

    Cost: in a step that is followed, a copy of the optimizer and of all that it trains.
    """

    def __init__(self, head: nn.Module, ranks: Ranks) -> None:
        self._weights, self._ranks, self._steps = list(head.parameters()), ranks, 0
        self._left: list[Tensor] = []
        self._again: tuple[Optimizer, list[tuple[Tensor, Tensor, Tensor]]] | None = None

    def before_batch(self) -> str:
        """Return what moved the head since the last batch; empty if nothing did."""
        left, self._left = self._left, []
        if not left:
            return ""
        moved = not all(torch.equal(a, b) for a, b in zip(left, self._weights, strict=True))
        return BETWEEN if any(self._ranks.gather(lambda: moved)) else ""

    def before_step(self, optimizer: Optimizer) -> None:
        """Copy an optimizer that is about to step.

        Args:
            optimizer: Optimizer of the run.
        """
        self._steps += 1
        if not _followed(self._steps) or isinstance(optimizer, LBFGS):  # that one asks for the gradient several times
            return
        with attempted(Exception):  # an optimizer of the user's may not be copied
            memo: dict[int, Any] = {}
            twin = copy.deepcopy(optimizer, memo)
            trained = [each for group in optimizer.param_groups for each in group["params"]]
            self._again = twin, [(each, memo[id(each)], each.detach().clone()) for each in trained]

    @torch.no_grad()
    def after_batch(self) -> str:
        """Repeat the step that was copied, and return how the head moved otherwise; empty if it did not."""
        again, self._again = self._again, None
        if self._steps and _followed(self._steps + 1):
            self._left = [each.detach().clone() for each in self._weights]
        if again is None:
            return ""
        apart = False
        with attempted(Exception):
            apart = self._differs(*again)
        return BESIDE if any(self._ranks.gather(lambda: apart)) else ""

    def _differs(self, twin: Optimizer, trained: list[tuple[Tensor, Tensor, Tensor]]) -> bool:
        for own, other, _ in trained:
            other.grad = None if own.grad is None else own.grad.detach().clone()
            if own.grad is not None and not bool(torch.isfinite(own.grad).all()):
                return False  # a gradient scaler leaves such a step out
        type(twin).step(twin)  # a scheduler has wrapped the step of the instance, which is that of the original
        return any(_apart(*three) for three in trained if any(three[0] is each for each in self._weights))


def _followed(step: int) -> bool:
    return step & (step - 1) == 0


def _apart(own: Tensor, again: Tensor, before: Tensor) -> bool:
    allowed = ULPS * torch.finfo(own.dtype).eps * (own.abs() + (again - before).abs())
    return bool(((own - again).abs() > allowed).any())
