"""Findings about where training goes: layers that never move, and a loss that curves downward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.step.course import BLOWN, LossCourse
from lightning_conv.health.wording import figure, listed

PATIENCE = 10
"""Optimizer steps without a movement from which on a layer is named.

Gradient scaling skips some of the first steps, and a warm-up begins at the rate 0."""

FLAT = 1e-6
"""Curvature over the largest one that counts as none: outputs in float32 leave no more of it."""

AT_ONCE = 1 << 22
"""Coordinates whose bits are read together."""

WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Type of whole numbers by the bytes of a number."""


@dataclass(frozen=True)
class Unmoved:
    """A layer whose weights are those of the first measurement, bit for bit as far as their sums tell.

    Attributes:
        name: Dotted name of the module.
        reason: ``"rate"``: its group has the rate 0. ``"absent"``: no optimizer has it. Empty: neither.
    """

    name: str
    reason: str = ""


def finding_of_movement(unmoved: list[Unmoved], *, layers: int, since: int, step: int) -> Finding | None:
    """Judge the layers that never moved; None: there were too few steps to say so.

    Args:
        unmoved: Layers that require gradients and have not moved.
        layers: Number of layers that require gradients.
        since: Step of the first measurement.
        step: Step of this one.

    Returns:
        ``warning``: layers that an optimizer has did not move. ``notice``: layers that require gradients are in no optimizer, which may
        be meant. ``ok``: all have moved. The value is the number of layers that did not.
    """
    if step - since < PATIENCE:
        return None
    level: Level = "ok"
    advice = ""
    absent = [each.name for each in unmoved if each.reason == "absent"]
    stuck = [each for each in unmoved if each.reason != "absent"]
    when = f"from step {since} to step {step}"
    if stuck:
        level = "warning"
        names = listed([each.name for each in stuck])
        reasons = {each.reason for each in stuck}
        it = "it has" if len(stuck) == 1 else "they have"
        if reasons == {"rate"}:
            says = f"The weights of {names} have not moved {when}: {it} the rate 0"
            advice = (
                "Give their group a rate; if they are meant to be frozen, requires_grad_(False) saves their gradients."
            )
        else:
            says = f"The weights of {names} have not moved {when}, though an optimizer has them"
            advice = "Look for a detach or no_grad behind them, for units that are off, and for a rate that is lost in rounding."
    elif absent:
        level = "notice"
        says = f"The weights of {listed(absent)} require gradients and have not moved {when}: no optimizer has them"
        advice = "If that is meant, requires_grad_(False) saves their gradients."
    else:
        says = f"{'The only trained layer' if layers == 1 else f'All {layers} trained layers'} moved {when}"
    value = float(len(unmoved))
    return Finding.exact(
        name="movement",
        level=level,
        sentence=f"{says}.",
        value=value,
        limit=0.0,
        step=step,
        advice=advice,
    )


def weight_digests(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    r"""Return two sums of the bits of every weight, by which a movement shows.

    .. math:: \sum_k b_k, \qquad \sum_k k b_k \pmod{2^{64}}

    with b_k the bits of coordinate k as a whole number. A change of one coordinate changes the first sum; one of two coordinates changes
    the first or the second, since their numbers differ.

    Args:
        weights: By name.

    Cost: the weights are read once, ``AT_ONCE`` of them at a time.
    """
    return {name: _digest(each) for name, each in weights.items()}


@torch.no_grad()
def _digest(weight: Tensor) -> tuple[int, int]:
    flat = torch.view_as_real(weight) if weight.is_complex() else weight
    whole = flat.detach().contiguous().view(WHOLE[flat.element_size()]).flatten()
    plain, placed = 0, 0
    for start in range(0, whole.numel(), AT_ONCE):
        bits = whole[start : start + AT_ONCE].long()
        places = torch.arange(start + 1, start + 1 + len(bits), device=bits.device)
        plain, placed = plain + int(bits.sum()), placed + int((bits * places).sum())
    return plain % 2**64, placed % 2**64


def curves_downward(forms: Tensor, largest: float = 0.0) -> bool | None:
    r"""Return whether a loss curves downward for every sample in every direction that was tried; None: it hardly curves.

    Args:
        forms: :math:`v^T S_i v` for random directions v of the outputs of sample i, (directions, n).
        largest: Largest size of such a number so far: a loss that has flattened since then says nothing.
    """
    if not forms.numel() or not bool(torch.isfinite(forms).all()):
        return None
    low, high = float(forms.min()), float(forms.max())
    if max(-low, high) <= FLAT * largest or low == high == 0:
        return None
    return low < 0 and high <= FLAT * max(largest, -low)


def finding_of_descent(course: LossCourse, *, downward_since: int | None, step: int) -> Finding | None:
    """Judge where a loss leads that curves downward; None: it does not, or has not fallen below zero.

    Robust losses curve downward far from their targets, but stay above zero; likelihoods go below zero, but curve upward.

    Args:
        course: The losses.
        downward_since: Step of the measurement from which on the loss curved downward (``curves_downward``); None: it does not now.
        step: Step of the measurement.

    Returns:
        ``alert``: such a loss is ``BLOWN`` times as far below zero as it started from it. ``warning``: it is below zero.
    """
    low = course.now
    if downward_since is None or math.isnan(low) or not low < 0 or not low < course.first:
        return None
    level: Level = "alert" if -low >= BLOWN * abs(course.first) else "warning"
    return Finding.exact(
        name="descent",
        level=level,
        sentence=f"The loss fell from {figure(course.first)} to {figure(low)} by step {course.step}, and it curves downward in the outputs "
        f"of every sample since step {downward_since}: the larger the outputs, the less it is, without an end in sight.",
        value=low,
        limit=0.0,
        step=step,
        advice="Look at the sign of the loss: a likelihood or a reward has to be negated to be minimised.",
    )
