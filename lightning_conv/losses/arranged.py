"""``ArrangedLoss``: one of torch's losses, times a constant, or over the positions of a sequence."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from lightning_conv.losses.torch_loss import is_elementwise, reduction

LARGEST = 100_000
"""Whole numbers up to this one, and their reciprocals, are taken for factors that someone wrote."""
DENOMINATORS = 64
NUMERATORS = 1000
"""The same for quotients p / q."""
CLOSE = 2e-6
"""Relative distance at which a measured factor is taken for a written one; the loss is then compared with that."""


@dataclass(frozen=True)
class ArrangedLoss:
    r"""The loss :math:`c \, \ell(u', y')` of a loss of torch, where u' and y' are outputs and targets in another layout.

    Attributes:
        base: The loss of torch.
        factor: c.
        classes: Number V of classes along the last axis of u, (n, ..., V): each position has a target, as in
            ``cross_entropy(u.flatten(0, -2), y.flatten())``; 0: u and y are given to the loss as they are.
        shifted: Number of positions by which the targets are ahead, as in ``(u[:, :-1], y[:, 1:])``: the last ones of u, and the first
            ones of y do not count.
        tail: Number of first positions of y alone that do not count, where u is that much shorter.
    """

    base: nn.Module
    factor: float = 1.0
    classes: int = 0
    shifted: int = 0
    tail: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it differs from the loss of torch by the factor alone."""
        return not (self.classes or self.shifted or self.tail)

    @property
    def is_usual(self) -> bool:
        """Whether it is plain, and no label is left out that torch does not leave out by itself."""
        return self.is_plain and getattr(self.base, "ignore_index", -100) == -100

    @property
    def reduction(self) -> str:
        """Reduction of the loss of torch."""
        return reduction(self.base)

    @property
    def __name__(self) -> str:
        """Name for messages, such as ``"0.5 x MSELoss"``."""
        ignored = getattr(self.base, "ignore_index", -100)
        settings = [f"reduction={self.reduction!r}"] if self.reduction != "mean" else []
        settings += [f"ignore_index={ignored}"] if ignored != -100 else []
        name = type(self.base).__name__ + (f"({', '.join(settings)})" if settings else "")
        times = "" if self.factor == 1 else f"{self.factor:.6g} x "
        over = " over the positions" if self.classes else ""
        ahead = f" with the targets {self.shifted or self.tail} ahead" if self.shifted or self.tail else ""
        return f"{times}{name}{over}{ahead}"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of all outputs together.

        Args:
            outputs: u, (n, ...).
            targets: y, (n, ...).
        """
        u, y = self.arrange(outputs, targets)
        loss: Tensor = self.factor * self.base(u, y)
        return loss

    def arrange(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return u' and y'."""
        u = outputs.reshape(len(outputs), -1, self.classes) if self.classes else outputs
        y = targets.reshape(len(targets), -1) if self.classes else targets
        if self.shifted:
            u = u[:, : -self.shifted]
        if cut := self.shifted or self.tail:
            y = y[:, cut:]
        if self.classes:
            return u.flatten(0, 1), y.flatten()
        return u, y.reshape(u.shape) if is_elementwise(self.base) and y.numel() == u.numel() else y

    def like(self, outputs: Tensor) -> ArrangedLoss:
        """Return the same loss with its weights in the type and on the device of the outputs."""
        return replace(self, base=copy.deepcopy(self.base).to(outputs))


def written_factor(measured: float) -> float | None:
    """Return the number that someone may have written where this one was measured; None: there is none so close.

    These are whole numbers and their reciprocals up to ``LARGEST``, quotients of small ones, and decimals of three digits.

    Example:
        >>> written_factor(0.50000001), written_factor(0.3333333), written_factor(0.123456)
        (0.5, 0.3333333333333333, None)
    """
    if not 0 < measured < math.inf:
        return None
    quotient = Fraction(measured).limit_denominator(DENOMINATORS)
    tried = [float(round(measured)), 1 / round(1 / measured) if measured < 1 else 0.0, float(f"{measured:.3g}")]
    if 0 < quotient.numerator <= NUMERATORS:
        tried.insert(0, float(quotient))
    return next(
        (each for each in tried if 0 < each <= LARGEST and abs(measured - each) <= CLOSE * measured),
        None,
    )


def layouts(
    losses: Sequence[Any], outputs: Tensor, classes: int, ignored: Sequence[int] = ()
) -> Iterator[ArrangedLoss]:
    """Yield the losses of torch in the layouts that training steps use.

    Args:
        losses: Losses of torch.
        outputs: u, (n, ...), of which the shape counts.
        classes: Length of the last axis of what the network returns; 0: there is only one.
        ignored: Values of ``ignore_index`` that are tried beside its own.
    """
    sequence = outputs.ndim > 2 or (classes and outputs.ndim == 2 and outputs.shape[1] > classes)
    for base in losses:
        if not isinstance(base, nn.Module):
            continue
        each = [base]
        if isinstance(base, (nn.CrossEntropyLoss, nn.NLLLoss)):
            each += [_ignoring(base, index) for index in ignored if index != base.ignore_index]
        for loss in each:
            yield ArrangedLoss(loss)
            if not sequence:
                continue
            if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
                if classes:
                    yield from (
                        ArrangedLoss(loss, classes=classes, shifted=s, tail=t) for s, t in ((0, 0), (1, 0), (0, 1))
                    )
            elif is_elementwise(loss):
                yield from (ArrangedLoss(loss, shifted=s, tail=t) for s, t in ((1, 0), (0, 1)))


def _ignoring(loss: nn.CrossEntropyLoss | nn.NLLLoss, index: int) -> nn.Module:
    made = copy.deepcopy(loss)
    made.ignore_index = index
    return made
