"""Findings about what enters the network and how it starts: inputs that are equal or of a wrong scale, a signal that does not arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.layers.layer_signal import LayerSignal
from lightning_conv.health.wording import counted, figure
from lightning_conv.networks.inputs import Inputs, input_tensors, sample_count

LARGE, SMALL = 100.0, 0.01
"""Root mean squares of the inputs beyond which their scale is worth knowing."""

EXCESS = 5.0
"""First loss over that of outputs of zero from which on the network counts as having started far off."""

DEEP = 4
"""Layers from which on the signal is followed."""

LOST = 1e-4
"""Spread of the last layers over that of the first one below which the signal counts as lost; above its inverse, as blown up.

A normalisation brings inputs of any scale to 1, which is neither: the first spread counts as at most 1 for the one, and as at least 1
for the other."""


@dataclass(frozen=True)
class InputScale:
    """The inputs of the probe.

    Attributes:
        samples: Their number.
        equal: Whether all of them are the same, of more than one.
        size: Largest root mean square of a tensor of the inputs; NaN: all of them are whole numbers, or a number is not finite.
    """

    samples: int
    equal: bool
    size: float


def input_scale(inputs: Inputs) -> InputScale:
    """Look at the inputs of a network.

    Args:
        inputs: n samples.

    Cost: the inputs are read once.
    """
    tensors = input_tensors(inputs)
    samples = sample_count(inputs)
    sizes = [
        float(each.double().square().mean().sqrt()) for each in tensors if each.is_floating_point() and each.numel()
    ]
    equal = samples > 1 and all(bool((each == each[:1]).all()) for each in tensors)
    finite = bool(sizes) and all(math.isfinite(each) for each in sizes)
    return InputScale(samples, equal, max(sizes) if finite else math.nan)


def finding_of_inputs(found: InputScale, *, excess: float | None = None, step: int | None = None) -> Finding:
    """Judge the inputs.

    Args:
        found: What they are.
        excess: The first loss on them over that of outputs of zero; None: not known.
        step: Step of the measurement.

    Returns:
        ``alert``: all samples are equal. ``warning``: their scale is above ``LARGE``, and the loss started ``EXCESS`` times above that of
        outputs of zero. ``notice``: their scale is above ``LARGE`` or below ``SMALL`` alone. ``ok``: everything else. The value is the
        scale.
    """
    level: Level = "ok"
    advice = ""
    scale = f"The inputs have a scale (root mean square) of {figure(found.size)}"
    if found.equal:
        level = "alert"
        says = f"All {counted(found.samples, 'sample')} of the probe are equal, so no network tells one from another"
        advice = "Look at how the data are loaded and transformed."
    elif math.isnan(found.size):
        says = f"The {counted(found.samples, 'sample')} of the probe are not all equal"
    elif found.size >= LARGE and excess is not None and excess >= EXCESS:
        level = "warning"
        says = f"{scale}, and the loss started at {figure(excess)} times that of outputs of zero"
        advice = "Scale the inputs to a mean of 0 and a variance of 1: initial weights are meant for that."
    elif found.size >= LARGE or found.size <= SMALL:
        level = "notice"
        says = f"{scale}; initial weights are meant for one near 1, unless a normalisation comes first"
    else:
        says = scale
    return Finding.exact(
        name="inputs",
        level=level,
        sentence=f"{says}.",
        value=found.size,
        limit=SMALL if found.size <= SMALL else LARGE,
        step=step,
        advice=advice,
    )


def finding_of_signal(
    layers: Sequence[LayerSignal], *, excess: float | None = None, lost_since: int | None = None, step: int
) -> Finding | None:
    """Judge how the signal changes with depth; None: there are fewer than ``DEEP`` layers, or nothing enters the first one.

    Args:
        layers: Their spreads, in order.
        excess: The first loss on these samples over that of outputs of zero; None: not known.
        lost_since: Step of an earlier measurement from which on the signal was lost (``is_lost``); None: this is the first time. Heads and
            branches that begin at zero take two steps to let it through.
        step: Step of the measurement.

    Returns:
        ``warning``: the signal is lost for two steps or more, or it has blown up and the loss started ``EXCESS`` times above that of
        outputs of zero. ``notice``: it is lost for the first time, or blown up alone. ``ok``: neither. The value is the spread of the
        last layers over that of the first one; where it grows, of the layer with the largest one.
    """
    if len(layers) < DEEP or not layers[0].spread > 0:
        return None
    first, last = layers[0], _last(layers)
    largest = max(layers, key=lambda each: each.spread)
    value = last.spread / first.spread
    level: Level = "ok"
    advice = ""
    if is_lost(layers):
        lasting = lost_since is not None and lost_since + 1 < step
        level = "warning" if lasting else "notice"
        since = f" since step {lost_since}" if lasting else ""
        says = (
            f"The signal shrinks with depth: what tells the samples apart is {figure(value)} times as large in {last.name} as in "
            f"{first.name}{since}"
        )
    elif largest.spread * LOST >= max(first.spread, 1.0):
        value = largest.spread / first.spread
        far = excess is not None and excess >= EXCESS
        level = "warning" if far else "notice"
        start = f", and the loss started at {figure(excess or 0.0)} times that of outputs of zero" if far else ""
        says = f"The signal grows with depth: {figure(value)}-fold from {first.name} to {largest.name}{start}"
    else:
        says = f"The signal passes through all {len(layers)} layers: it is {figure(value)} times as large in {last.name} as in {first.name}"
    if level == "warning":
        advice = "Use an initialisation for the activation (He et al. 2015 for ReLU), normalisation layers or skip connections."
    return Finding.exact(
        name="signal",
        level=level,
        sentence=f"{says}.",
        value=value,
        limit=LOST if value < 1 else 1 / LOST,
        step=step,
        advice=advice,
    )


def is_lost(layers: Sequence[LayerSignal]) -> bool:
    """Return whether the last layers have less than ``LOST`` of the spread of the first one, which counts as at most 1.

    Args:
        layers: Their spreads, in order.
    """
    return len(layers) >= DEEP and _last(layers).spread < LOST * min(layers[0].spread, 1.0)


def _last(layers: Sequence[LayerSignal]) -> LayerSignal:
    """Return the layer with the largest spread of the last quarter, two at least: heads and branches may begin at zero."""
    return max(layers[-max(2, len(layers) // 4) :], key=lambda each: each.spread)
