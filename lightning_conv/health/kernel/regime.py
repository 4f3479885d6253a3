"""``training_regime``: whether a run stays with the kernel of its start (lazy) or changes it (feature learning)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

from lightning_conv.arguments import require_number, require_type

Regime: TypeAlias = Literal["lazy", "feature learning", "undecided"]

LAZY_CHANGE, LAZY_ALIGNMENT, LAZY_ERROR = 0.1, 0.99, 0.1
"""A lazy run has at most this relative change, at least this alignment and at most this error of the network linearised at the start."""

LEARNING_CHANGE, LEARNING_ALIGNMENT = 0.5, 0.9
"""A run that learns features has at least this relative change and at most this alignment, and the network linearised at the start does
not predict its outputs."""

PROGRESS = 2.0
"""Factor by which the loss has changed when there is something to judge."""


@dataclass(frozen=True)
class TrainingRegime:
    """What the numbers say.

    Attributes:
        regime: ``"lazy"``, ``"feature learning"`` or ``"undecided"``.
        reason: Which number decided, or why none did.
        alignment: Centred alignment of the present kernel with that of the start.
        change: |G - G_0|_F / |G_0|_F.
        error: Error of the network linearised at the start, as a share of the movement of the outputs; None: not known.
    """

    regime: Regime
    reason: str
    alignment: float
    change: float
    error: float | None

    @property
    def beyond_lazy(self) -> bool:
        """Whether kernel and linearised network are both beyond the limits of a lazy run, however far the loss has come."""
        return self.change > LAZY_CHANGE and self.error is not None and self.error > LAZY_ERROR


def training_regime(
    alignment: float, change: float, error: float | None, *, progress: float, floor: float = 0.0
) -> TrainingRegime:
    r"""Judge the regime of a run by three numbers; the limits are conventions of this package, and neither regime is better.

    - ``lazy``: the kernel has hardly changed, :math:`|G - G_0| \le 0.1 |G_0|` and alignment of at least 0.99, and the network
      linearised at the start gives the movement of the outputs within 10 %.
    - ``feature learning``: the kernel has changed its directions, :math:`|G - G_0| \ge 0.5 |G_0|` and alignment of at most 0.9, and
      the linearised network, if its error is known, is wrong by more than 10 %. A kernel that has only grown keeps its alignment and is
      undecided.
    - ``undecided``: everything else, such as a loss that has risen with the change of the kernel, which is no learning, and a run whose
      loss has changed less than twofold: it has not begun.

    Args:
        alignment: Centred alignment (``centred_alignment``), at most 1; NaN: not defined.
        change: Relative change (``relative_frobenius_change``).
        error: Error of the linearised network (``linearisation_error``); None: not known.
        progress: Loss at the start over the present loss.
        floor: Relative change that rounding explains (``Drift.floor``).

    Raises:
        TypeError: An argument is no number.
        ValueError: ``change``, ``floor`` or ``error`` is negative, or ``floor`` is not finite.

    Source: Chizat, Oyallon, Bach 2019 (1812.07956, section 1.1: lazy if the relative change of the Jacobian is small while that of
    the loss is not); Fort et al. 2020 (2010.15110, section 3: change and alignment of the kernel during training).

    Example:
        >>> training_regime(0.999, 0.03, 0.02, progress=100.0).regime
        'lazy'
    """
    for name, value in (("alignment", alignment), ("change", change), ("progress", progress), ("error", error)):
        if value is not None or name != "error":
            require_type(name, value, Real, "a number")
    require_number("floor", floor, least=0.0)
    for name, value in (("change", change), ("error", error)):
        if value is not None and value < 0:
            raise ValueError(f"{name}: {value}; need 0 or more")
    regime, reason = _judged(alignment, change, error, progress, floor)
    return TrainingRegime(regime, reason, alignment, change, error)


def _judged(alignment: float, change: float, error: float | None, progress: float, floor: float) -> tuple[Regime, str]:
    if not (math.isfinite(alignment) and math.isfinite(change)) or math.isnan(progress) or math.isnan(error or 0.0):
        return "undecided", "a number is not finite or not defined"
    if progress < 0:
        return "undecided", "the loss has changed its sign"
    if not (progress >= PROGRESS or 0 <= progress <= 1 / PROGRESS):
        return "undecided", f"the loss has changed less than {PROGRESS:g}-fold"
    if change - floor >= LEARNING_CHANGE and alignment <= LEARNING_ALIGNMENT:
        if error is not None and error <= LAZY_ERROR:
            return "undecided", "the kernel changed, and yet the network linearised at the start predicts the outputs"
        if progress < 1:
            return "undecided", "the kernel has changed its directions, and the loss has risen"
        return "feature learning", "the kernel has changed its directions"
    if change + floor <= LAZY_CHANGE and alignment >= LAZY_ALIGNMENT:
        if error is None:
            return (
                "undecided",
                "the kernel has hardly changed, but the error of the network linearised at the start is not known",
            )
        if error <= LAZY_ERROR:
            return "lazy", "the kernel has hardly changed, and the network linearised at the start predicts the outputs"
        return (
            "undecided",
            "the kernel has hardly changed, but the network linearised at the start does not predict the outputs",
        )
    if change - floor >= LEARNING_CHANGE and alignment >= LAZY_ALIGNMENT:
        return "undecided", "the kernel has changed its size more than its directions"
    return "undecided", "the change of the kernel lies between the limits"
