"""The gradient bounds of Allen-Zhu, Li & Song 2019, Theorem 3, as ratios: no critical point near the start."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_conv.losses.squared import HalfSumOfSquares

SOURCE = "Allen-Zhu, Li, Song 2019, Theorem 3"


@dataclass(frozen=True)
class GradientRatios:
    r"""|grad F|_F^2 in relation to F = sum_i F_i and to max_i F_i, with F_i = (1/2) |u_i - y_i|^2.

    Theorem 3 says that near the initialisation, with high probability over it,

    .. math:: \Omega\Bigl(\frac{\delta m}{d n}\Bigr) \max_i F_i \le |\nabla F|_F^2 \le O\Bigl(\frac{L n m}{d}\Bigr) F ,

    and hence |grad F|^2 >= Omega(delta m / (d n^2)) F. Here n is the number of samples, m the width, L the depth, d the
    number of outputs and delta the separation of the data. The constants are unspecified, so no verdict follows: the
    ratios are reported, and one can see whether they stay constant over training and over widths.
    """

    loss: float  # F
    largest: float  # max_i F_i
    squared_gradient: float  # |grad F|_F^2

    @property
    def over_sum(self) -> float:
        """|grad F|^2 / F, the PL ratio; between 2 lambda_min and 2 lambda_max of the NTK Gram matrix."""
        return self.squared_gradient / self.loss if self.loss > 0 else float("nan")

    @property
    def over_largest(self) -> float:
        """|grad F|^2 / max_i F_i."""
        return self.squared_gradient / self.largest if self.largest > 0 else float("nan")

    def lower_constant(self, *, width: int, samples: int, outputs: int, delta: float) -> float:
        """Return |grad F|^2 / max_i F_i over delta m / (d n), the constant of the lower bound. NaN for delta = 0."""
        return self.over_largest * outputs * samples / (delta * width) if delta > 0 else float("nan")

    def upper_constant(self, *, width: int, samples: int, outputs: int, depth: int) -> float:
        """Return |grad F|^2 / F over L n m / d, the constant of the upper bound."""
        return self.over_sum * outputs / (depth * samples * width)


def gradient_ratios(objective: HalfSumOfSquares) -> GradientRatios:
    """Compute the ratios from ``half_sum_of_squares`` of any module or from ``AllenZhuNet.objective``.

    The ratio of a loss k F is k times that of F, so divide the ratios of a run on k F by k.
    """
    return GradientRatios(objective.loss, objective.largest, objective.squared_gradient)
