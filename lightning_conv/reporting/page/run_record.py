"""``RunRecord``: what is known of a run when its page is written, and the JSON file of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_conv.health.finding import Finding
from lightning_conv.reporting.report import report_json
from lightning_conv.reporting.series import Series, points_each
from lightning_conv.theory.criterion import Criterion


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        name: What the run is called on the page.
        facts: Values by name: the module, how the run ended, the number of steps.
        findings: Of ``ConvergenceHealth``, for the networks of all optimizers.
        not_judged: What could not be judged, by the reason.
        criteria: Of ``ConvergenceCriteria``.
        metrics: Last values by tag.
        steps: The optimizer steps at which they were measured, by tag, as far as they are known.
        series: Values of a quantity by step, by tag.
        shares: Each layer's share of the kernel's trace, by the name of the optimizer, which is empty where there is one.
        settings: Settings and versions by group and name.
        seconds: What measuring took, by what was done.
        optimizers: Names of the optimizers that have a network of their own; ``("",)``: there is one.
        labels: The audit of the labels in Markdown; empty: there is none. It is not in the JSON file.
        missing: Why parts of the record are not known, one sentence each.
    """

    name: str
    facts: Mapping[str, object] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    not_judged: Mapping[str, Sequence[str]] = field(default_factory=dict)
    criteria: Sequence[Criterion] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    optimizers: Sequence[str] = ("",)
    labels: str = ""
    missing: Sequence[str] = ()

    def to_json(self) -> str:
        """Return all but the labels as JSON, in which NaN and infinity become null.

        All series together have at most ``POINTS`` points, or ``FEWEST`` each, with ``DIGITS`` significant digits.
        """
        health = [each.to_json() for each in self.findings]
        names = ("not_judged", "shares", "settings", "seconds", "optimizers", "missing")
        more = {name: getattr(self, name) for name in names}
        most = points_each(len(self.series))
        series = {tag: each.to_json(most) for tag, each in self.series.items()}
        return report_json(self.facts, self.criteria, self.metrics, health, self.steps, more, series)

    @classmethod
    def from_json(cls, text: str, *, name: str, series: Mapping[str, Series], missing: Sequence[str] = ()) -> RunRecord:
        """Return the record of a JSON file, also of one that an earlier version wrote, which has less.

        Args:
            text: The file.
            name: What the run is called.
            series: Values by step, by tag, as the logger has them; they stand before those of the file, which has those that did not
                change, too.
            missing: What else is not known.

        Raises:
            ValueError: The text is no JSON, or that of something else.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or not {"facts", "criteria", "metrics"} <= content.keys():
            raise ValueError("no facts, criteria and metrics in it: it is not one that ConvergenceReport wrote")
        try:
            return cls(
                name=name,
                facts=_mapping(content["facts"]),
                findings=[Finding.from_json(each) for each in content.get("health", ())],
                not_judged={why: list(names) for why, names in _mapping(content.get("not_judged", {})).items()},
                criteria=[_criterion(each) for each in content["criteria"]],
                metrics={tag: _number(value) for tag, value in _mapping(content["metrics"]).items()},
                steps={tag: int(step) for tag, step in _mapping(content.get("steps", {})).items()},
                series=_joined(series, _mapping(content.get("series", {}))),
                shares={
                    of: {layer: _number(share) for layer, share in each.items()}
                    for of, each in _mapping(content.get("shares", {})).items()
                },
                settings={group: _mapping(each) for group, each in _mapping(content.get("settings", {})).items()},
                seconds={what: _number(each) for what, each in _mapping(content.get("seconds", {})).items()},
                optimizers=[str(each) for each in content.get("optimizers", ("",))] or ("",),
                missing=[*(str(each) for each in content.get("missing", ())), *missing],
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"its content is not that of ConvergenceReport ({type(error).__name__}: {error})"
            ) from error


def _joined(series: Mapping[str, Series], kept: Mapping[str, Any]) -> dict[str, Series]:
    """Return the series of a logger with what those of the file have beside them."""
    known = {tag: Series.from_json(each) for tag, each in kept.items()}
    return known | {tag: each.joined(known[tag]) if tag in known else each for tag, each in series.items()}


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError(f"{content!r:.60} where names with values are expected")
    return content


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _criterion(content: Mapping[str, Any]) -> Criterion:
    """Return a criterion from its fields, in which a number that is not finite was written as null."""
    known = {each.name: content[each.name] for each in fields(Criterion)}
    return Criterion(**(known | {name: _number(known[name]) for name in ("measured", "bound")}))
