"""Linear regions of a ReLU network of one variable: all breakpoints, exactly, and the largest possible number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from torch import nn

from lightning_conv.theory.criterion import Criterion, at_most

SOURCE = "Montufar, Pascanu, Cho, Bengio 2014; Serra, Tjandraatmadja, Ramalingam 2018, Theorem 1 for one input"
Arithmetic = Literal["exact", "float64"]
SAME_SLOPE = 1e-9
"""In float64, slopes of the output count as equal if they differ by less than this share of the steepest one."""


@dataclass(frozen=True)
class LinearRegions:
    """Breakpoints of a network x -> f(x) of one variable, on the whole line."""

    activation: tuple[float, ...]  # points where some unit of some hidden layer switches, ascending
    kinks: tuple[float, ...]  # those of them where f itself changes its slope
    widths: tuple[int, ...]
    arithmetic: Arithmetic

    @property
    def pieces(self) -> int:
        """Number of linear pieces of f."""
        return len(self.kinks) + 1

    @property
    def activation_regions(self) -> int:
        """Number of intervals on which no unit switches; at least ``pieces``."""
        return len(self.activation) + 1

    def within(self, lower: float, upper: float) -> int:
        """Count the pieces of f that meet the open interval (lower, upper)."""
        return sum(lower < kink < upper for kink in self.kinks) + 1

    @property
    def criterion(self) -> Criterion:
        """pieces <= prod_l (m_l + 1). The theorem has no hypotheses, so a violation means that the count is wrong."""
        asks = "linear pieces <= product of (width + 1)"
        return at_most("linear_regions", SOURCE, asks, float(self.pieces), float(most_regions(self.widths)))


def most_regions(widths: Sequence[int]) -> int:
    """Compute prod_l (m_l + 1), the largest number of activation regions of a network of one variable.

    On each interval on which layer l - 1 is linear, a unit of layer l changes its sign at most once, so the numbers R_l
    of intervals satisfy R_l <= R_{l-1} (m_l + 1).

    Example:
        >>> most_regions([3, 3])
        16
    """
    return math.prod(width + 1 for width in widths)


def typical_regions(widths: Sequence[int]) -> int:
    """Compute sum_l m_l + 1, about the number of regions at random initialisation: one breakpoint per unit.

    Source: Hanin & Rolnick 2019 (the number grows with the units and not exponentially with the depth); Kogan,
    Jananthan, Kepner 2025 (the leading term for one input, He scaling, random biases and infinite width).
    """
    return sum(widths) + 1


def linear_regions(model: nn.Module, *, arithmetic: Arithmetic = "exact") -> LinearRegions:
    r"""Find all breakpoints of a ReLU network with one input, on (-inf, inf).

    The algorithm goes through the layers. The pre-activations of a layer are piecewise linear with known knots. Where
    one of them changes its sign between two knots, or beyond the last, a knot is added; then the ReLU is applied. At
    the end the slopes of f to the left and to the right of each knot are compared. With several outputs a kink of any
    of them counts.

    With ``"exact"`` arithmetic the weights, and therefore all knots, are rational numbers, and every decision is exact
    (whether a unit switches here, whether two knots are the same, whether two slopes are equal). ``"float64"`` takes
    the same steps in floating point: breakpoints closer than rounding may be merged or split, and slopes within 1e-9 of
    the steepest count as equal.

    Args:
        model: An ``nn.Sequential`` of ``nn.Linear`` and ``nn.ReLU`` (which may be nested) with one input.
        arithmetic: ``"exact"`` or ``"float64"``, as described above.

    Raises:
        ValueError: The model is another module, has more than one input, or has weights that are not finite.

    Cost: R m_l m_{l-1} operations per layer with R knots. The rational numbers grow by about 53 bits with each layer
    and each power of the width. Three layers of 32 take seconds, wider ones minutes.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [1.0]])), net[0].bias.data.copy_(torch.tensor([0.0, -1.0]))
        >>> linear_regions(net).kinks
        (0.0, 1.0)
    """
    layers = _layers(model)
    number: Callable[[Any], Any] = Fraction if arithmetic == "exact" else float
    numbers = np.vectorize(number, otypes=[object if arithmetic == "exact" else float])
    pieces = _Pieces([], np.array([[number(1)]]), np.array([[number(0)]]))
    for weight, bias in layers[:-1]:
        pieces = _rectify(_affine(pieces, numbers(weight), numbers(bias)))
    output = _affine(pieces, *(numbers(array) for array in layers[-1]))
    bends = _bends(output.slope, exact=arithmetic == "exact")
    kinks = tuple(float(knot) for knot, bend in zip(output.knots, bends, strict=True) if bend)
    widths = tuple(len(bias) for _, bias in layers[:-1])
    return LinearRegions(tuple(float(knot) for knot in output.knots), kinks, widths, arithmetic)


@dataclass(frozen=True)
class _Pieces:
    """Functions of x that are slope x + constant on each of the intervals between the knots."""

    knots: list[Any]  # K - 1 of them, ascending
    slope: np.ndarray  # (K, functions)
    constant: np.ndarray  # (K, functions)


def _affine(f: _Pieces, weight: np.ndarray, bias: np.ndarray) -> _Pieces:
    return _Pieces(f.knots, f.slope @ weight.T, f.constant @ weight.T + bias)


def _rectify(f: _Pieces) -> _Pieces:
    """Apply the ReLU to each function, with the intervals cut wherever one of them changes its sign."""
    knots: list[Any] = []
    slopes, constants = [], []
    for piece, (slope, constant) in enumerate(zip(f.slope, f.constant, strict=True)):
        lower = f.knots[piece - 1] if piece else -math.inf
        upper = f.knots[piece] if piece < len(f.knots) else math.inf
        # The zero of each function; a constant one has none and keeps its sign.
        zeros = [-c / s if s != 0 else None for s, c in zip(slope, constant, strict=True)]
        ends = [*sorted({z for z in zeros if z is not None and lower < z < upper}), upper]
        for start, end in zip([lower, *ends[:-1]], ends, strict=True):
            # No zero lies inside (start, end), so each function has one sign there.
            signs = zip(slope, constant, zeros, strict=True)
            active = np.array([c > 0 if z is None else (s > 0) == (z <= start) for s, c, z in signs])
            slopes.append(np.where(active, slope, 0 * slope))
            constants.append(np.where(active, constant, 0 * constant))
            knots.append(end)
    return _Pieces(knots[:-1], np.array(slopes), np.array(constants))


def _bends(slope: np.ndarray, *, exact: bool) -> list[bool]:
    """Decide at each knot whether any function changes its slope there."""
    changes = slope[1:] - slope[:-1]
    if exact:
        return [bool((row != 0).any()) for row in changes]
    least = SAME_SLOPE * np.abs(slope).max() if slope.size else 0.0
    return [bool((np.abs(row) > least).any()) for row in changes]


def _layers(model: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return weights and biases in float64, in order.

    Raises:
        ValueError: The module is not a sequence of linear layers with ReLUs between them, has more than one input, or
            has weights that are not finite.
    """
    modules = [m for m in model.modules() if not isinstance(m, nn.Sequential)]
    if isinstance(model, nn.Sequential):
        expected = [nn.Linear if k % 2 == 0 else nn.ReLU for k in range(len(modules))]
    else:
        expected = []
    kinds = [type(m) for m in modules]
    if not kinds or kinds != expected or len(kinds) % 2 == 0:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"model: {names or type(model).__name__}; need an nn.Sequential of nn.Linear, nn.ReLU, ..., nn.Linear"
        )
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    if linear[0].in_features != 1:
        raise ValueError(f"model: {linear[0].in_features} inputs; linear regions are for one input")
    found = []
    for layer in linear:
        weight = layer.weight.detach().double().cpu().numpy()
        bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().cpu().numpy()
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError("model: has NaN or infinite weights")
        found.append((weight, bias))
    return found
