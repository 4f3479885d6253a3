"""``ForecastRecord``: earlier forecasts of the loss, how wrong they were, and whether the next one may be shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from lightning_conv.arguments import require_whole

LEAST = 3
"""Earlier forecasts as far ahead that must have been compared before one is shown."""

RECENT = 10
"""How many of the latest ones its error is taken from."""

USEFUL = 0.5
"""Typical relative error of them above which none is shown."""

KEPT = 4096
"""Comparisons that are kept; the oldest ones are dropped."""


@dataclass(frozen=True, kw_only=True)
class PredictedLoss:
    """One number of a forecast beside what came.

    Attributes:
        share: Share of the run that was over when it was made; NaN: the length of the run is not known.
        before: The loss when it was made.
        predicted: The loss of the forecast.
        real: The loss that came.
    """

    share: float
    before: float
    predicted: float
    real: float

    @property
    def error(self) -> float:
        """Return the relative error of the forecast, |predicted - real| / |real|; ``inf``: one of them is not finite."""
        return relative_error(self.predicted, self.real)

    @property
    def error_unchanged(self) -> float:
        """Return the relative error of the cheapest forecast: that the loss stays as it was."""
        return relative_error(self.before, self.real)


@dataclass(frozen=True, kw_only=True)
class Comparison(PredictedLoss):
    """The same in the record of a run.

    Attributes:
        made: Step at which the forecast was made.
        step: Step that it was about.
        place: Its place in the forecast: 0 is the next measurement.
    """

    made: int
    step: int
    place: int


@dataclass(frozen=True, kw_only=True)
class ShownForecast:
    """A forecast with the errors of its predecessors, place by place.

    Attributes:
        made: Step at which it was made.
        steps: Later steps.
        losses: Predicted losses.
        errors: Median relative error of the latest forecasts as far ahead.
        compared: How many of them there were, of each.
    """

    made: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    errors: tuple[float, ...]
    compared: tuple[int, ...]


class ForecastRecord:
    """Keeps forecasts until their steps have come and compares them with the losses that were measured.

    Args:
        total: Number of steps of the whole run; None: not known.

    Raises:
        TypeError: ``total`` is no whole number.
        ValueError: It is negative.
    """

    def __init__(self, total: int | None = None) -> None:
        if total is not None:
            require_whole("total", total, least=0)
        self.total = total
        self.comparisons: list[Comparison] = []
        self._open: list[dict[str, Any]] = []

    def keep(self, made: int, loss: float, predicted: Mapping[int, float]) -> None:
        """Keep a forecast.

        Args:
            made: The present step.
            loss: The present loss.
            predicted: Losses by later step; those after the end of the run are left out.

        Raises:
            ValueError: A step is not later than ``made``.
        """
        if any(step <= made for step in predicted):
            raise ValueError(
                f"predicted: steps {sorted(predicted)}; need steps after {made}, when the forecast is made"
            )
        share = made / self.total if self.total else math.nan
        self._open += [
            {"made": made, "step": step, "place": place, "share": share, "before": loss, "predicted": predicted[step]}
            for place, step in enumerate(sorted(predicted))
            if self.total is None or step <= self.total
        ]

    def compare(self, step: int, loss: float) -> list[Comparison]:
        """Compare what was predicted for this step with its loss, and return the comparisons.

        Forecasts of earlier steps that were never measured are dropped.
        """
        found = [Comparison(real=loss, **each) for each in self._open if each["step"] == step]
        self._open = [each for each in self._open if each["step"] > step]
        self.comparisons = (self.comparisons + found)[-KEPT:]
        return found

    def errors(
        self, *, since: float | None = None, until: float | None = None, place: int | None = None
    ) -> list[float]:
        """Return the relative errors of the forecasts, or of those that were made in a part of the run.

        Args:
            since: Share of the run from which on, included; None: from the start. Without ``total`` no share is known, so
                none is returned for one.
            until: Share of the run up to which, included; None: up to the end.
            place: Only those in this place of their forecasts; None: all.
        """
        return [
            each.error
            for each in self.comparisons
            if (since is None or each.share >= since)
            and (until is None or each.share <= until)
            and (place is None or each.place == place)
        ]

    def shown(self) -> ShownForecast | None:
        """Return the latest forecast as far as it may be shown; None: not at all.

        A number of it is shown if at least ``LEAST`` earlier ones in the same place have been compared, and of the latest
        ``RECENT`` of these the median relative error is at most ``USEFUL`` and not above that of the cheapest forecast, which is that
        the loss stays as it is.
        """
        if not self._open:
            return None
        made = max(each["made"] for each in self._open)
        rows = []
        for each in self._open:
            past = [one for one in self.comparisons if one.place == each["place"]][-RECENT:]
            if each["made"] == made and may_be_shown(past) and math.isfinite(each["predicted"]):
                error = median(one.error for one in past)
                rows.append((each["step"], each["predicted"], error, len(past)))
        if not rows:
            return None
        steps, losses, errors, compared = zip(*rows, strict=True)
        return ShownForecast(made=made, steps=steps, losses=losses, errors=errors, compared=compared)

    def state_dict(self) -> dict[str, Any]:
        """Return everything in plain types."""
        rows = [asdict(each) for each in self.comparisons]
        return {"total": self.total, "comparisons": rows, "open": [dict(each) for each in self._open]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned; a number of steps that is known here already stays."""
        self.total = state["total"] if self.total is None else self.total
        self.comparisons = _comparisons(state["comparisons"])
        self._open = [dict(each) for each in state["open"]]


def may_be_shown(past: Sequence[Comparison]) -> bool:
    """Return whether these comparisons allow to show the next forecast (``ForecastRecord.shown``)."""
    if len(past) < LEAST:
        return False
    error = median(each.error for each in past)
    return error <= USEFUL and error <= median(each.error_unchanged for each in past)


def relative_error(predicted: float, real: float) -> float:
    """Return |predicted - real| / |real|; 0 if they are equal, ``inf`` if one of them is not finite or only the real one is 0.

    Example:
        >>> relative_error(0.5, 0.25), relative_error(0.1, 0.0)
        (1.0, inf)
    """
    if not (math.isfinite(predicted) and math.isfinite(real)):
        return math.inf
    if predicted == real:
        return 0.0
    return abs(predicted - real) / abs(real) if real else math.inf


def _comparisons(rows: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    return [Comparison(**row) for row in rows]
