"""Findings about what is switched off or broken: units, layers without a gradient, and values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.layers.activity import LayerActivity
from lightning_conv.health.wording import counted, figure, listed, percent

MANY = 0.5
"""Share of a layer's units from which on it is a notice that they are out."""

VANISHED = 1e-12
"""Share of the kernel's trace below which a layer counts as without a gradient."""


def finding_of_units(
    layers: Sequence[LayerActivity],
    *,
    samples: int,
    step: int,
    since: int | None = None,
    were_on: bool = False,
    outputs_constant: bool = False,
) -> Finding:
    """Judge the units of all activations.

    Args:
        layers: What they did on the probe.
        samples: Samples of the probe.
        step: Step of the measurement.
        since: Step of an earlier measurement from which on these layers were out; None: this is the first time. Gates and branches
            that begin at zero are constant at the start of healthy runs, so once is a notice unless ``were_on``.
        were_on: Whether an earlier measurement saw one of these layers with units that were not out.
        outputs_constant: Whether the network returns the same for all samples, though their inputs differ.

    Returns:
        ``alert``: a whole layer is out and the network's outputs are constant, and it was out at an earlier measurement. ``warning``: a
        whole layer is out for the second time, or it went out in training and the outputs are constant. ``notice``: it is out for the
        first time, or at least ``MANY`` of the units of one layer are. ``ok``: fewer. The value is the largest share in a layer.
    """
    shares = {each.name: _share(each) for each in layers}
    worst = max(layers, key=_share, default=None)
    level: Level = "ok"
    advice = ""
    out = [each for each in layers if each.is_out]
    if out:
        lasting = since is not None and since < step
        lost = were_on and outputs_constant
        level = ("alert" if outputs_constant else "warning") if lasting else "warning" if lost else "notice"
        where = f" since step {since}" if lasting else ""
        silent = ", and the network returns the same for all of them" if outputs_constant else ""
        says = f"{_all_out(out)} on the {samples} samples of the probe{where}{silent}"
        if lost and not lasting:
            says += "; at an earlier measurement they were not out"
            advice = "Look at the steps since then: a rate that is too large switches units off, and a dead one gets no gradient any more."
        if lasting and since == 0 and len(out[0].constant) < out[0].units:
            advice = "They were so from the start: look at the initial weights and biases before them, and at the scale of the inputs."
    elif worst is not None and shares[worst.name] >= MANY:
        level = "notice"
        number = round(shares[worst.name] * worst.units)
        says = f"{number} of {counted(worst.units, 'unit')} of {worst.name} {_state(worst)} on the {samples} samples of the probe"
    elif worst is None:
        says = "The network has no activation that could be switched off"
    else:
        number = sum(round(shares[each.name] * each.units) for each in layers)
        says = f"{number} of {counted(sum(each.units for each in layers), 'unit')} are switched off on the {samples} samples of the probe"
    value = max(shares.values(), default=math.nan)
    return Finding.exact(
        name="units",
        level=level,
        sentence=f"{says}.",
        value=value,
        limit=MANY,
        step=step,
        advice=advice,
    )


def finding_of_layers(shares: Mapping[str, float], before: Mapping[str, float] | None, *, step: int) -> Finding | None:
    """Judge how the kernel's trace is shared among the layers; None: there is no trace to share.

    A layer counts as without a gradient only if it was so at the measurement before, too: a last layer of zeros at the start, and the
    second factor of LoRA, make zero shares of healthy runs.

    Args:
        shares: Share of each layer in the trace of the kernel; NaN: the trace is zero.
        before: The same at the measurement before; None: this is the first one.
        step: Step of the measurement.

    Returns:
        ``warning``: layers have had no gradient twice. ``ok``: none, or for the first time.
    """
    if not shares or any(math.isnan(each) for each in shares.values()):
        return None
    now = [name for name, share in shares.items() if share <= VANISHED]
    twice = [name for name in now if before is not None and before.get(name, 1.0) <= VANISHED]
    least = min(shares.values())
    level: Level = "ok"
    advice = ""
    if twice:
        level = "warning"
        most = figure(max(shares[name] for name in twice))
        it = "it is" if len(twice) == 1 else "they are"
        says = (
            f"The outputs do not depend on the weights of {listed(twice)} at two measurements in a row, so {it} not trained"
            if all(shares[name] == 0 for name in twice)
            else f"The weights of {listed(twice)} move the outputs by at most {most} of the kernel's "
            f"trace at two measurements in a row, so {it} hardly trained"
        )
        advice = "Look for units that are off behind these layers, and for outputs that are cut from the graph."
        if any(shares[name] > 0 for name in twice):
            advice = "Look for units that are off, and for a signal that vanishes with depth."
    elif now:
        much = "do not depend" if all(shares[name] == 0 for name in now) else "hardly depend"
        says = f"The outputs {much} on the weights of {listed(now)} at this measurement"
    else:
        name = min(shares, key=lambda each: shares[each])
        says = f"Every layer moves the outputs; the least, {name}, by {percent(least)} of the kernel's trace"
        if len(shares) == 1:
            says = f"The only layer, {name}, moves the outputs"
    return Finding.exact(
        name="layers",
        level=level,
        sentence=f"{says}.",
        value=least,
        limit=VANISHED,
        step=step,
        advice=advice,
    )


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """The first value of a run that was not finite.

    Attributes:
        kind: What it belongs to.
        name: Name of the weight, the buffer or the module; empty for the loss and the inputs.
        step: Step at which it was seen.
        moment: Whether the optimizer had stepped.
        value: ``"NaN"`` or ``"infinite"``.
        skipped: Whether the step was left out, as a gradient scaler does.
    """

    kind: Literal["input", "output", "loss", "gradient", "weight", "buffer"]
    step: int
    moment: Literal["before", "after"]
    name: str = ""
    value: Literal["NaN", "infinite"] = "NaN"
    skipped: bool = False


ADVICE = {
    "input": "Clean the data, or look at how it is scaled: the network is not the cause.",
    "output": "Look at this module and its inputs: its weights and the batch were finite.",
    "loss": "Look at the loss, such as a logarithm or a quotient: the outputs were finite.",
    "gradient": "Look at the backward pass, such as a root or a norm at zero: the loss was finite.",
}
"""What each kind says, if it is the first value that is not finite; a weight or a buffer tells no cause by itself."""


def finding_of_not_finite(first: NotFinite | None, *, step: int, inputs_checked: bool = False) -> Finding:
    """Judge whether all values were finite.

    Args:
        first: The first one that was not; None: all were.
        step: The present step.
        inputs_checked: Whether everything that comes before ``first`` in a step was looked at as well (inputs, outputs, loss, gradient),
            so that it is known to be the first. Otherwise no advice is given.

    Returns:
        ``alert``: a value is not finite. ``notice``: the step was skipped for it. ``ok``: all are finite. The value is their number, 0
        or 1.
    """
    if first is None:
        return _finite("ok", f"All values that were looked at up to step {step} are finite", "", 0.0, step)
    what = f"the {first.kind}{'' if not first.name else f' of {first.name}'}"
    if first.skipped:
        says = f"At step {first.step} {what} was {first.value}, and the step was skipped, as gradient scaling does"
        return _finite("notice", says, "", 1.0, first.step)
    says = f"At step {first.step} {what} became {first.value}, {first.moment} the step of the optimizer"
    return _finite("alert", says, ADVICE.get(first.kind, "") if inputs_checked else "", 1.0, first.step)


def _finite(level: Level, says: str, advice: str, value: float, step: int) -> Finding:
    return Finding.exact(
        name="not_finite",
        level=level,
        sentence=f"{says}.",
        value=value,
        limit=0.0,
        step=step,
        advice=advice,
    )


def _share(layer: LayerActivity) -> float:
    return len({*layer.dead, *layer.saturated, *layer.constant}) / layer.units if layer.units else 0.0


def _all_out(layers: Sequence[LayerActivity]) -> str:
    """Say which layers are out, and how: those that have the same number of units in the same state together."""
    alike: dict[tuple[int, str], list[str]] = {}
    for each in layers:
        alike.setdefault((each.units, _state(each)), []).append(each.name)
    parts = [f"all {counted(units, 'unit')} of {listed(names)} {state}" for (units, state), names in alike.items()]
    said = listed(parts)
    return said[0].upper() + said[1:]


def _state(layer: LayerActivity) -> str:
    """Say what is true of all units that are out; a dead unit is constant, too."""
    if not layer.saturated:
        return "are constant" if set(layer.constant) - set(layer.dead) else "are dead (zero)"
    return (
        "are dead, saturated or constant" if {*layer.dead, *layer.constant} - set(layer.saturated) else "are saturated"
    )
