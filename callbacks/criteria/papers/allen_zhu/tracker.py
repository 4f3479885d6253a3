"""``AllenZhuTracker``: Allen-Zhu, Li & Song 2019 in a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_conv.callbacks.criteria.papers.allen_zhu.separation import (
    ALLEN_ZHU,
    DataSeparation,
    find_separation,
    judge_separation,
)
from lightning_conv.callbacks.criteria.papers.allen_zhu.states import ForwardStability
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria
from lightning_conv.callbacks.run.assumptions import EVERYWHERE
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion, at_most
from lightning_conv.theory.papers.allen_zhu import GradientRatios
from lightning_conv.theory.papers.allen_zhu.semi_smoothness import Residual, fit_semi_smoothness
from lightning_conv.theory.tools.observation import Observation


@register_criteria
class AllenZhuTracker(CriteriaTracker):
    """Judges the data, the hidden states around the start, and the semi-smoothness of the loss.

    Theorem 3, that there is no critical point near the start, has unspecified constants: its quotients are logged without a verdict.
    """

    name, position = "allen_zhu", 30
    source = ALLEN_ZHU
    assumes = EVERYWHERE | {"squared loss"}
    needs = frozenset({"layers", "activity", "step norms"})
    once = frozenset({"separation", "separation_by_label", "close_pairs"})
    hypotheses = frozenset({"separation", "separation_by_label"})

    def __init__(self) -> None:
        self._separation: DataSeparation | str = "not looked at"
        self._stability = ForwardStability()

    def begin(self, run: RunView) -> None:
        """Look at the data, and whether the run trains the paper's network."""
        self._separation = find_separation(run.inputs, run.targets)
        self._stability.begin(run.network, run.inputs, run.measurement.parameters)

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Return the separation, ``gradient_over_largest``, and what stands for the constants of the lemmas."""
        separated = self._separation.quantities() if isinstance(self._separation, DataSeparation) else {}
        last, k, ratio = run.history[-1], math.nan, {}
        if run.scale is not None and run.targets is not None:
            k = run.scale.k
            ratio = largest_share(run.outputs, run.targets, k, last)
        raw, delta = run.layers | run.activity | ratio, separated.get("separation", math.nan)
        return separated | ratio | self._stability.measure(raw, last, k=k, delta=delta)

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return the criteria of the data, of the hidden states, and ``semi_smoothness``."""
        found = judge_separation(self._separation, whole_set=run.whole_set)
        found += self._stability.criteria(from_the_start=run.from_the_start)
        return [*found, judge_semi_smoothness(run.history)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return self._stability.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._stability.load_state_dict(state)


def largest_share(outputs: Tensor, targets: Tensor, k: float, seen: Observation) -> dict[str, float]:
    """Return ``gradient_over_largest``: |grad f|^2 / max_i f_i, where f_i = (k / 2) |u_i - y_i|^2 is a sample's share of f = k S.

    Args:
        outputs: u, one row per sample.
        targets: y, as many numbers.
        k: the scale of the squared loss.
        seen: the observation of these weights.
    """
    if targets.numel() != outputs.numel() or math.isnan(seen.gradient_norm):
        return {}
    rows = outputs.double() - targets.to(outputs.device).double().reshape(outputs.shape)
    largest = k / 2 * float(rows.flatten(1).square().sum(1).max())
    found = GradientRatios(seen.loss, largest, seen.gradient_norm**2).over_largest
    return {"gradient_over_largest": found} if math.isfinite(found) else {}


def judge_semi_smoothness(history: Sequence[Observation]) -> Criterion:
    """Fit the bound rho <= a sqrt(F) |V| + b |V|^2 to every other observed step, and judge twice that on the steps in between."""
    clear = [seen for seen in history if not math.isnan(seen.curvature) and seen.spectral > 0]
    steps = [Residual(seen.loss, seen.next_loss, seen.linear, seen.spectral) for seen in clear]
    source = f"{ALLEN_ZHU}, Theorem 4"
    asks = "rho <= 2 (a sqrt(F) |V| + b |V|^2), a and b fitted to every other observed step"
    try:
        used = fit_semi_smoothness(steps[::2]).use(steps[1::2])
    except ValueError:
        why = f"{len(steps)} steps were observed with a residual above rounding; it takes four"
        return Criterion("semi_smoothness", source, asks, math.nan, math.nan, "undecided", why)
    return at_most("semi_smoothness", source, asks, max(used, default=math.nan), 2.0)
