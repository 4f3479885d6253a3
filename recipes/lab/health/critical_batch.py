r"""``fit_hyperbola``: the critical batch size from the steps that runs of several batch sizes take to a loss.

Source: McCandlish et al. 2018 (1812.06162), equation 2.11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FINE = 400
"""Critical batch sizes that are tried, evenly spaced on a logarithmic axis."""


@dataclass(frozen=True)
class Hyperbola:
    r"""Steps by batch size, :math:`S = S_{\min} (1 + B_{\mathrm{crit}} / B)`.

    Attributes:
        least_steps: S_min, of a batch without noise.
        critical_batch: B_crit: at this batch the steps are twice as many.
        error: Root mean square of the deviations of log S.
    """

    least_steps: float
    critical_batch: float
    error: float


def fit_hyperbola(steps: Mapping[int, float], *, span: tuple[float, float] = (0.1, 1e5)) -> Hyperbola:
    r"""Fit :math:`(S / S_{\min} - 1) (E / E_{\min} - 1) = 1` with E = B S by least squares in log S.

    Args:
        steps: S by batch size B.
        span: Between which critical batches it is looked for.

    Raises:
        ValueError: There are fewer than three batch sizes, or numbers that are not positive.
    """
    if len(steps) < 3 or any(not (batch > 0 and 0 < number < math.inf) for batch, number in steps.items()):
        raise ValueError(f"steps: {dict(steps)}; need positive numbers of three batch sizes or more")

    def fitted(critical: float) -> Hyperbola:
        rests = [math.log(number) - math.log1p(critical / batch) for batch, number in steps.items()]
        level = sum(rests) / len(rests)
        error = math.sqrt(sum((each - level) ** 2 for each in rests) / len(rests))
        return Hyperbola(math.exp(level), critical, error)

    low, high = map(math.log, span)
    tried = [fitted(math.exp(low + (high - low) * k / FINE)) for k in range(FINE + 1)]
    return min(tried, key=lambda each: each.error)


def fewest_steps(
    steps_to_loss: Callable[[float, int], int | None], rates: list[float], *, first: int, most: int
) -> tuple[int, int] | None:
    """Search the learning rate with which a loss is reached in the fewest steps, up and down from a first guess.

    Args:
        steps_to_loss: Steps with a rate, of which a limit is not to be passed; None: the loss is not reached within it.
        rates: The rates that are allowed, ascending.
        first: Place of the first guess.
        most: Largest number of steps.

    Returns:
        The steps and the place of the rate; None: the loss is not reached with the rates that were tried.
    """
    best: tuple[int, int] | None = None
    for direction in (1, -1):
        misses = 0
        place = first if direction == 1 else first - 1
        while 0 <= place < len(rates) and misses < (1 if best else 2):
            found = steps_to_loss(rates[place], most if best is None else best[0])
            if found is not None and (best is None or found < best[0]):
                best, misses = (found, place), 0
            else:
                misses += 1
            place += direction
    return best
