"""Findings without a judgement of good or bad: the forecast, the regime, a bound of lambda_min. They are all ``ok``."""

from __future__ import annotations

import math

from lightning_conv.health.finding import Finding
from lightning_conv.health.kernel.forecast_record import ShownForecast
from lightning_conv.health.kernel.regime import TrainingRegime
from lightning_conv.health.kernel.subset_bound import SubsetBound
from lightning_conv.health.wording import counted, figure, listed, page_of, percent


def finding_of_forecast(shown: ShownForecast | None) -> Finding | None:
    """Say where the loss will be, with the error of the earlier forecasts; None: no forecast may be shown.

    Args:
        shown: What ``ForecastRecord.shown`` allows.
    """
    if shown is None:
        return None
    step, loss, error, number = shown.steps[-1], shown.losses[-1], shown.errors[-1], shown.compared[-1]
    return Finding(
        name="forecast",
        level="ok",
        sentence=f"If training goes on like this, the loss of the probe is about {figure(loss)} at step {step}; the last "
        f"{counted(number, 'forecast')} as far ahead {'was' if number == 1 else 'were'} off by {percent(error)} in the median.",
        value=loss,
        step=shown.made,
    )


def regime_numbers(found: TrainingRegime) -> str:
    """Return the numbers that the regime is judged by, in words.

    Args:
        found: The regime, decided or not.
    """
    alignment = "not defined" if math.isnan(found.alignment) else figure(found.alignment)
    numbers = f"alignment with the kernel at the start {alignment}, change {_share_of(found.change, 'its norm')}"
    if found.error is not None:
        numbers += f", error of the linearised network {_share_of(found.error, 'what the outputs moved')}"
    return numbers


def finding_of_regime(found: TrainingRegime, *, step: int) -> Finding | None:
    """Say whether the run is lazy or learns features, with the numbers; None: it is undecided.

    Args:
        found: The regime.
        step: Step of the measurement.
    """
    if found.regime == "undecided":
        return None
    says = {
        "lazy": "The network trains close to its linearisation at the start",
        "feature learning": "The network learns features",
    }[found.regime]
    return Finding(
        name="regime",
        level="ok",
        sentence=f"{says}: {found.reason} ({regime_numbers(found)}).",
        value=found.change,
        step=step,
    )


def finding_of_subset(bound: SubsetBound, *, step: int) -> Finding | None:
    """Say what the kernel over some of the parameters proves; None: nothing, since it is not certified or zero.

    Args:
        bound: The bound.
        step: Step of the measurement.
    """
    probe = bound.probe
    if not (probe.certified and probe.lower > 0):
        return None
    where = "all training samples" if bound.on_training_set else f"the {bound.samples} samples of the probe"
    rest = "" if bound.on_training_set else "; this says nothing of other samples"
    return Finding(
        name="lambda_min_bound",
        level="ok",
        sentence=f"The smallest eigenvalue of the {_kernel(bound)} on {where} is at least {figure(probe.lower)}, proven by "
        f"{counted(len(bound.parameters), 'parameter tensor')} of the network ({listed(bound.parameters)}){rest}.",
        value=probe.value,
        lower=probe.lower,
        upper=probe.upper,
        limit=0.0,
        step=step,
        page=page_of("lambda_min"),
    )


def _kernel(bound: SubsetBound) -> str:
    if bound.outputs == "cotangents":
        return "kernel of the loss gradients"
    if bound.n_outputs == 1 or bound.outputs == "full":
        return "kernel"
    return (
        f"kernel summed over {bound.n_outputs:,} outputs" if bound.outputs == "trace" else "kernel of the summed output"
    )


def _share_of(value: float, whole: str) -> str:
    """Write a number relative to another one: in per cent below 2, and as so many times it from there on."""
    if not math.isfinite(value):
        return figure(value)
    return f"{percent(value)} of {whole}" if value < 2 else f"{figure(value)} times {whole}"
