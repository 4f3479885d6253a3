"""``DataFacts``: what the theorems ask of the probe's inputs whatever the weights are, found out once a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_conv.callbacks.criteria.certificates import ALLEN_ZHU
from lightning_conv.networks.evaluation import Inputs
from lightning_conv.theory.criterion import Criterion, not_applicable
from lightning_conv.theory.papers.allen_zhu import Separation, are_unit_inputs, direction_rounding, separation
from lightning_conv.theory.papers.frei import FREI, NearOrthogonality, near_orthogonality

CLOSE = 1e-6
"""Inputs closer than this are counted: some ten times what float32 makes of two positive multiples of one input."""

NO_TENSOR = "the input is not one tensor of numbers"


@dataclass(frozen=True)
class DataFacts:
    """How far apart, and how far from orthogonal, the inputs are."""

    samples: int
    rounding: float  # closer directions than this are not told from equal ones
    separation: Separation | None
    orthogonality: NearOrthogonality | None
    why: str  # what is missing is missing for; empty: nothing is

    @property
    def equal_pairs(self) -> int:
        """Pairs of inputs that point the same way up to rounding: duplicates and positive multiples."""
        return 0 if self.separation is None else self.separation.below[self.rounding]

    @property
    def close_pairs(self) -> int:
        """Pairs within ``CLOSE`` of one another, the equal ones among them."""
        return 0 if self.separation is None else self.separation.below[CLOSE]

    def of_separation(self, *, whole_set: bool) -> list[Criterion]:
        """delta after Allen-Zhu's normalisation, over all pairs and over those of different classes, with the closest pair and the count.

        Args:
            whole_set: whether the probe is the training set, whose delta may otherwise be smaller.
        """
        if self.separation is None:
            asks = "|x_i - x_j| >= delta > 0"
            return [Criterion("separation", ALLEN_ZHU, asks, math.nan, math.nan, "undecided", self.why)]
        found = []
        for each, rows in zip(
            self.separation.criteria(), (self.separation.delta, self.separation.by_label), strict=False
        ):
            assert rows is not None  # there is a criterion for it
            found.append(replace(each, reason=f"{each.reason}; least between samples {rows.first} and {rows.second}"))
        pairs = self.samples * (self.samples - 1) // 2
        count = f"of {pairs} pairs {self.close_pairs} are closer than {CLOSE:g}, {self.equal_pairs} of them equal up to rounding"
        found[0] = replace(found[0], reason=f"{found[0].reason}; {count}")
        return [_on_the_probe(each, "delta", whole_set) for each in found]

    def of_orthogonality(self, slope: float | None, *, whole_set: bool, why_not: str) -> Criterion:
        """kappa against what Frei et al. ask.

        Args:
            slope: gamma of the leaky ReLU; None: the run is not one that the theorem is about.
            whole_set: see ``of_separation``.
            why_not: the reason where ``slope`` is None.
        """
        asks = "|x_i|^2 >= C n max |x_i . x_k|, C = 3 gamma^-3 (R_max/R_min)^2"
        if self.orthogonality is None:
            return not_applicable("near_orthogonality", FREI, asks, self.why)
        if slope is None:
            return not_applicable("near_orthogonality", FREI, asks, why_not, self.orthogonality.kappa.value)
        (found,) = (each for each in self.orthogonality.criteria(slope) if each.name == "near_orthogonality")
        first, second = self.orthogonality.pair
        found = replace(found, reason=f"{found.reason}; samples {first} and {second} are the least orthogonal")
        return _on_the_probe(found, "kappa", whole_set)

    def quantities(self) -> dict[str, float]:
        """As scalars."""
        found: dict[str, float] = {}
        if self.separation is not None:
            found |= {"separation": self.separation.delta.distance.value, "close_pairs": float(self.close_pairs)}
            if self.separation.by_label is not None:
                found["separation_by_label"] = self.separation.by_label.distance.value
        if self.orthogonality is not None and math.isfinite(self.orthogonality.kappa.value):
            found["near_orthogonality"] = self.orthogonality.kappa.value
        return found


def data_facts(inputs: Inputs, targets: Tensor | None, *, separated: bool = True, orthogonal: bool = True) -> DataFacts:
    """Both of them, or what there is: never an error.

    Args:
        inputs: of the probe.
        targets: of the probe; classes, or anything else, which is not looked at.
        separated: whether separation is wanted.
        orthogonal: whether near orthogonality is wanted.

    Cost: up to 4 n^2 d flops in float64, and two copies of the inputs.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return DataFacts(0, 0.0, None, None, NO_TENSOR)
    x, why = inputs.detach().cpu(), []
    rounding = direction_rounding(x[0].numel())
    apart, orthogonality = None, None
    try:
        if separated:
            labels, normalised = _classes(targets, len(x)), are_unit_inputs(x)
            apart = separation(x, labels, below=(rounding, CLOSE), normalised=normalised)
    except Exception as error:  # an input without a direction, or no room
        why.append(str(error))
    try:
        orthogonality = near_orthogonality(x) if orthogonal else None
    except Exception as error:
        why.append(str(error))
    return DataFacts(len(x), rounding, apart, orthogonality, "; ".join(dict.fromkeys(why)))


def _classes(targets: Tensor | None, samples: int) -> Tensor | None:
    """Class numbers, two or more different ones, or None."""
    if targets is None or targets.is_floating_point() or targets.shape != (samples,):
        return None
    return targets.cpu() if bool((targets != targets[0]).any()) else None


def _on_the_probe(criterion: Criterion, what: str, whole_set: bool) -> Criterion:
    """On a part of the set nothing is proven of the whole: the number on the probe is an upper bound of that of the training set."""
    if whole_set or criterion.verdict != "certified":
        return criterion
    where = f"; on the probe, whose {what} is an upper bound of the training set's"
    return replace(criterion, verdict="consistent", reason=criterion.reason + where)
