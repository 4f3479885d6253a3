"""``LabelAudit``: how far the other samples support each label, with the most suspicious ones as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.arguments import require_number, require_whole
from lightning_conv.reporting.markdown import markdown_table

Baseline: TypeAlias = Literal["inputs", "features", "loss"]

BASELINES: Mapping[Baseline, str] = {
    "inputs": "the same margin with a Gaussian kernel of the inputs, which knows no network",
    "features": "the same margin with a Gaussian kernel of the last hidden features",
    "loss": "the loss of the sample, largest first",
}
"""What the margins are held against."""

MARGIN = (
    "*margin*: score of the given label minus the largest score of another one, by kernel ridge regression with the network's "
    "kernel on all other samples; below 0 they suggest another label, and -1 is as sure as 0 against 1."
)
"""Legend of the margins."""

TOP = 20
"""Labels that are shown."""


@dataclass(frozen=True, kw_only=True)
class SuspiciousLabel:
    """One sample of an audit.

    Attributes:
        number: Number of the sample among those that were audited.
        given: Its label.
        suggested: The label that the other samples suggest; the given one where they agree.
        margin: Score of the given label minus the largest score of another one.
        rank: Its place by the margin; 1 is the most suspicious one.
        ranks: Its place by each baseline that was computed.
    """

    number: int
    given: int
    suggested: int
    margin: float
    rank: int
    ranks: Mapping[Baseline, int]


@dataclass(frozen=True, kw_only=True)
class LabelAudit:
    """How far the other samples support each label.

    Attributes:
        labels: Given labels, (n,).
        margins: Leave-one-out margins by the network's kernel, (n,); below 0 the other samples suggest another label.
        suggested: The label of the largest score, (n,).
        judged: Samples with at least one other sample of their label, (n,); no others can be judged.
        ridge: What was added to the diagonal of the kernel.
        baselines: What the margins are held against, (n,); as in the margins the lowest value is the most suspicious.
        left_out: Baselines that could not be computed, and why.
    """

    labels: Tensor
    margins: Tensor
    suggested: Tensor
    judged: Tensor
    ridge: float
    baselines: Mapping[Baseline, Tensor] = field(default_factory=dict)
    left_out: Mapping[Baseline, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Return the number n of samples."""
        return len(self.labels)

    @property
    def agreement(self) -> float:
        """Return the share of the judged labels that the other samples suggest as well."""
        return float((self.suggested == self.labels)[self.judged].double().mean())

    @property
    def order(self) -> Tensor:
        """Return the numbers of the judged samples, the most suspicious one first."""
        return self._order(self.margins)

    def _order(self, scores: Tensor) -> Tensor:
        chosen = self.judged.nonzero()[:, 0]
        return chosen[scores[chosen].argsort(stable=True)]

    def beyond(self, limit: float) -> Tensor:
        """Return the numbers of the samples whose margin is at most the limit, the most suspicious one first.

        Args:
            limit: A margin.

        Raises:
            TypeError: It is no number.
            ValueError: It is NaN.
        """
        require_number("limit", limit, finite=False)
        order = self.order
        return order[self.margins[order] <= limit]

    def top(self, count: int = TOP) -> list[SuspiciousLabel]:
        """Return the most suspicious labels.

        Args:
            count: How many, at most.

        Raises:
            TypeError: It is no whole number.
            ValueError: It is negative.
        """
        require_whole("count", count, least=0)
        places: dict[Baseline, Tensor] = {}
        for name, scores in self.baselines.items():
            places[name] = torch.zeros(self.samples, dtype=torch.long)
            order = self._order(scores)
            places[name][order] = torch.arange(1, len(order) + 1)
        return [
            SuspiciousLabel(
                number=number,
                given=int(self.labels[number]),
                suggested=int(self.suggested[number]),
                margin=float(self.margins[number]),
                rank=rank,
                ranks={name: int(each[number]) for name, each in places.items()},
            )
            for rank, number in enumerate(self.order[:count].tolist(), 1)
        ]

    def require_numbers(self, numbers: Sequence[int] | None) -> None:
        """Refuse numbers that are not those of the samples.

        Args:
            numbers: The argument of this name; None: not known.

        Raises:
            ValueError: There are other than one for each sample.
        """
        if numbers is not None and len(numbers) != self.samples:
            raise ValueError(f"numbers: {len(numbers)} of them; need one for each of {self.samples} samples")

    def table(self, count: int = TOP, *, numbers: list[int] | None = None) -> str:
        """Return the most suspicious labels as a Markdown table.

        Args:
            count: How many, at most.
            numbers: Number of each sample in the training set; None: only its number among those that were audited is shown.

        Raises:
            ValueError: There are other than one for each sample.
        """
        self.require_numbers(numbers)
        columns = ["rank", "sample", "given", "suggested", "margin", *(f"rank by {name}" for name in self.baselines)]
        if numbers is not None:
            columns.insert(2, "of the training set")
        rows = []
        for each in self.top(count):
            row = [str(each.rank), str(each.number), str(each.given), str(each.suggested), f"{each.margin:.3f}"]
            if numbers is not None:
                row.insert(2, str(numbers[each.number]))
            rows.append([*row, *(str(each.ranks[name]) for name in self.baselines)])
        return markdown_table(columns, rows)

    def narrow_table(self, count: int = TOP, *, numbers: list[int] | None = None) -> str:
        """Return ``table`` in four columns, without the ranks, for a text that is not wide.

        Args:
            count: How many rows, at most.
            numbers: See ``table``.

        Raises:
            ValueError: There are other than one for each sample.
        """
        self.require_numbers(numbers)
        rows = []
        for each in self.top(count):
            of_set = "" if numbers is None else f" ({numbers[each.number]} of the training set)"
            rows.append((f"{each.number}{of_set}", str(each.given), str(each.suggested), f"{each.margin:.3f}"))
        return markdown_table(("sample", "given", "suggested", "margin"), rows)

    def markdown(self, count: int = TOP, *, numbers: list[int] | None = None) -> str:
        """Return the table with a legend of its columns.

        Args:
            count: How many rows, at most.
            numbers: See ``table``.
        """
        legend = [MARGIN]
        legend += [f"*rank by {name}*: {what}." for name, what in BASELINES.items() if name in self.baselines]
        legend += [f"*rank by {name}* is left out: {why}." for name, why in self.left_out.items()]
        if alone := self.samples - int(self.judged.sum()):
            legend.append(f"Not judged: {alone} samples that are the only ones of their label.")
        return f"{self.table(count, numbers=numbers)}\n\n{' '.join(legend)}"
