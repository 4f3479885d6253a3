"""``TrainedHead``: the head of a run as a point of its convex problem, on the features of the frozen trunk in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.trunk_rows import TrunkRows
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.expressivity.stream import read_rows
from lightning_conv.last_layer import HeadProblem
from lightning_conv.last_layer.features import WORD
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.losses.per_sample import SampleLosses
from lightning_conv.machine.memory import available_memory, blocks


class TrainedHead:
    """W = [weight, bias] of the head as the run has it now, and the problem that it is a point of.

    All ranks build the problem and compute with it alike. Features that are not held pass by in strips, which the ranks compute together.

    Args:
        view: The run.
        allowed: Bytes that the problem may take, the same on all ranks; None: ``head_memory``.

    Attributes:
        problem: The convex problem of the head.
        parameters: The parameters of the head that are trained.
        narrow: Where the float64 copy of the trunk computes in less, so that nothing about these features is proven; empty: nowhere.

    Raises:
        RuntimeError: The problem could not be built on one of several ranks; raised on all of them.
    """

    def __init__(self, view: GuardView, allowed: int | None = None) -> None:
        self.problem, self.narrow = _build(view, head_memory(view.ranks) if allowed is None else allowed)
        self.parameters = view.head_parameters

    @property
    def w(self) -> Tensor:
        """The matrix W, (D, C), in float64."""
        return self.problem.stack(*self.parameters)

    @torch.no_grad()
    def write(self, w: Tensor) -> None:
        """Write W into the layer, in the type of the layer.

        Args:
            w: W, (D, C).
        """
        for parameter, part in zip(self.parameters, self.problem.split(w), strict=False):
            assert part is not None
            parameter.copy_(part.to(parameter))

    def measure(self, value: Bounded | None = None) -> dict[str, float]:
        """Return ``loss``, and ``gap`` where the infimum is known: one pass over the features.

        Args:
            value: L(W), where it is known already.
        """
        value, infimum = value or self.problem.value(self.w), self.problem.infimum
        return {"loss": value.value} if infimum is None else {"loss": value.value, "gap": value.value - infimum.value}


def head_memory(ranks: Ranks) -> int:
    """Return the bytes that the head's problem may take in each process, the same number on all ranks.

    Args:
        ranks: Processes of the run.
    """
    return min(ranks.gather(lambda: available_memory(torch.device("cpu")))) // 4 // ranks.world


def holds_features(view: GuardView, allowed: int) -> bool:
    """Return whether the problem holds the features, in float64: those that take at most half of what is allowed.

    Args:
        view: The run.
        allowed: Bytes.
    """
    return 2 * WORD * view.data.size * view.head.width <= allowed


def _build(view: GuardView, allowed: int) -> tuple[HeadProblem, str]:
    ranks, head, loss, targets = view.ranks, view.head, view.loss, view.loss.targets()
    named: dict[str, Any] = {"outputs": head.module.out_features, "infimum": loss.given_infimum}
    # What may go wrong on one rank alone comes before the walks that all of them take part in.
    ranks.alike(lambda: SampleLosses(loss.loss_fn, targets, **named))
    rows = ranks.alike(lambda: TrunkRows.of(view.data, view.network, head, torch.float64))
    held = _held(rows, ranks, allowed) if holds_features(view, allowed) else None
    named |= {"bias": head.has_bias, "fixed_bias": head.fixed_bias, "max_memory": allowed}

    def build() -> HeadProblem:
        return HeadProblem(rows if held is None else held, targets, loss.loss_fn, **named)

    made = build() if held is None else ranks.alike(build)
    return made, rows.narrow or ""


def _held(source: TrunkRows, ranks: Ranks, allowed: int) -> Tensor:
    """Read all rows, strip by strip."""
    held = ranks.alike(lambda: torch.empty(source.samples, source.width, dtype=torch.float64))
    for some in blocks(source.samples, max(1, allowed // (4 * WORD * source.width))):
        held[some] = read_rows(source, some)
    return held
