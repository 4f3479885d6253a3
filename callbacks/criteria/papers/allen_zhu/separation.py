"""``find_separation``: how far apart the probe's inputs are, which Allen-Zhu et al. ask for whatever the weights are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_conv.callbacks.run.assumptions import on_the_probe
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.networks.inputs import Inputs
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.allen_zhu import Separation, are_unit_inputs, direction_rounding, separation

ALLEN_ZHU = "Allen-Zhu, Li & Song 2019 (1811.03962)"

CLOSE = 1e-6
"""Inputs closer than this are counted: some ten times the distance that float32 leaves between two positive multiples of one input."""


@dataclass(frozen=True)
class DataSeparation:
    """How far apart the inputs are."""

    samples: int
    rounding: float  # directions closer than this cannot be told from equal ones
    measured: Separation

    @property
    def equal_pairs(self) -> int:
        """Number of pairs that point the same way up to rounding: duplicates and positive multiples."""
        return self.measured.below[self.rounding]

    @property
    def close_pairs(self) -> int:
        """Number of pairs within ``CLOSE`` of each other, equal ones included."""
        return self.measured.below[CLOSE]

    def criteria(self, *, whole_set: bool) -> list[Criterion]:
        """Judge delta after the paper's normalisation, over all pairs and over those of different classes.

        The reasons name the closest pair and the number of close ones.

        Args:
            whole_set: whether the probe is the training set, whose delta may otherwise be smaller.
        """
        found = []
        closest = self.measured.delta, self.measured.by_label
        for each, rows in zip(self.measured.criteria(), closest, strict=False):
            assert rows is not None  # there is a criterion for it
            found.append(replace(each, reason=f"{each.reason}; least between samples {rows.first} and {rows.second}"))
        pairs = self.samples * (self.samples - 1) // 2
        count = f"of {pairs} pairs {self.close_pairs} are closer than {CLOSE:g}, {self.equal_pairs} of them equal up to rounding"
        found[0] = replace(found[0], reason=f"{found[0].reason}; {count}")
        return [on_the_probe(each, "delta", whole_set=whole_set) for each in found]

    def quantities(self) -> dict[str, float]:
        """Return ``separation``, ``close_pairs`` and, for data of several classes, ``separation_by_label``."""
        found = {"separation": self.measured.delta.distance.value, "close_pairs": float(self.close_pairs)}
        if self.measured.by_label is not None:
            found["separation_by_label"] = self.measured.by_label.distance.value
        return found


def find_separation(inputs: Inputs, targets: Tensor | None) -> DataSeparation | str:
    """Measure how far apart the inputs are, or say why that is not known.

    Args:
        inputs: of the probe.
        targets: of the probe: class numbers; anything else is ignored.

    Cost: up to 2 n^2 d flops in float64, and a copy of the inputs.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return "the input is not one tensor of numbers"
    x = inputs.detach().cpu()
    rounding = direction_rounding(x[0].numel())
    # An input may have no direction, and there may be no room.
    with attempted(ValueError, RuntimeError, MemoryError) as attempt:
        labels, normalised = _classes(targets, len(x)), are_unit_inputs(x)
        found = separation(x, labels, below=(rounding, CLOSE), normalised=normalised)
        return DataSeparation(len(x), rounding, found)
    return str(attempt.error)


def judge_separation(found: DataSeparation | str, *, whole_set: bool) -> list[Criterion]:
    """Return the criteria of what ``find_separation`` returned; undecided where separation is not known."""
    if isinstance(found, DataSeparation):
        return found.criteria(whole_set=whole_set)
    asks = "|x_i - x_j| >= delta > 0"
    return [Criterion("separation", ALLEN_ZHU, asks, math.nan, math.nan, "undecided", found)]


def _classes(targets: Tensor | None, samples: int) -> Tensor | None:
    """Return the class numbers where there are two or more different ones, otherwise None."""
    if targets is None or targets.is_floating_point() or targets.shape != (samples,):
        return None
    return targets.cpu() if bool((targets != targets[0]).any()) else None
