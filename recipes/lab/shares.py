"""``Share``: how many of how many, with its Wilson interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z = 1.959963984540054
"""Quantile of the normal distribution for two-sided 95 %."""


@dataclass(frozen=True)
class Share:
    """So many of so many.

    Attributes:
        hits: The number of those that did.
        of: The number of all.

    Raises:
        ValueError: There are more hits than all, or fewer than none.
    """

    hits: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.of:
            raise ValueError(f"hits, of: {self.hits}, {self.of}; need 0 <= hits <= of")

    @classmethod
    def among(cls, answers: Iterable[bool]) -> Share:
        """Count the answers that are true."""
        given = list(answers)
        return cls(sum(given), len(given))

    @property
    def value(self) -> float:
        """The share; NaN: of none."""
        return self.hits / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        r"""The Wilson score interval at 95 %; (0, 1) of none.

        .. math:: \Big( \hat p + \tfrac{z^2}{2 n} \pm z \sqrt{\tfrac{\hat p (1 - \hat p)}{n} + \tfrac{z^2}{4 n^2}} \Big)
            \Big/ \Big( 1 + \tfrac{z^2}{n} \Big)

        Source: Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22.
        """
        if not self.of:
            return 0.0, 1.0
        n, p = self.of, self.value
        middle = p + Z**2 / (2 * n)
        spread = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        low, high = ((middle + sign * spread) / (1 + Z**2 / n) for sign in (-1, 1))
        return max(low, 0.0), min(high, 1.0)

    @property
    def words(self) -> str:
        """The share in per cent with the interval and the numbers.

        Example:
            >>> Share(9, 10).words, Share(0, 0).words
            ('90 % (60 to 98; 9 of 10)', 'none')
        """
        if not self.of:
            return "none"
        low, high = (100 * each for each in self.interval)
        return f"{100 * self.value:.0f} % ({low:.0f} to {high:.0f}; {self.hits} of {self.of})"
