"""From a Gram matrix in tiles to proven bounds of the singular values: two verified Cholesky factors and inverse Lanczos."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.expressivity.factor import lowest_eigenvalue, rounding, solve, tiled_cholesky
from lightning_conv.expressivity.journal import Journal
from lightning_conv.expressivity.stream import gram_rounding
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.kernels.products.precision import gamma
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.largest import complement_bound
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.lanczos import Krylov, lanczos
from lightning_conv.reporting.progress import Report, part

STEPS = 40
CLOSE = 0.01
"""Relative distance of the second shift from the Rayleigh quotient: sigma_min is then known to half of that."""

LARGEST_STEPS = 12
"""Products with G that sigma_max may take."""
RESIDUAL = 1e-4
"""Of the largest Ritz value, relative: the upper bound is above it by about the square, 1e-8."""

METHOD = "verified Cholesky of the tiled float64 Gram matrix"


@dataclass(frozen=True)
class Proven:
    """What the factors prove of [h, 1]."""

    rank: int  # at least
    sigma_min: Bounded  # the n-th singular value; up to infinity where the first factor failed
    sigma_max: Bounded
    reach: float  # sigma_min that rounding lets be proven, at least


@dataclass(frozen=True)
class Proof:
    """From the Gram matrix to the bounds.

    Args:
        gram: G as computed.
        factor: where the factors go.
        width: m_H, on which the rounding of G depends.
        feature_error: see ``certify_expressivity``.
        journal: of what is done.
        report: told the share that is done.
    """

    gram: Tiles
    factor: Tiles
    width: int
    feature_error: float
    journal: Journal
    report: Report

    def run(self) -> Proven:
        """The first factor is the proof; the second brings the lower bound of sigma_min to within a percent."""
        gram, n = self.gram, self.gram.size
        diagonal = gram.diagonal()
        trace, largest = float(diagonal.sum()), float(diagonal.max())
        error = gram_rounding(gram, self.width)
        sigma_max = self._largest(trace, error)
        # Just so that a success proves lambda_min > 0 of the exact matrix.
        shift = 1.05 * (error + rounding(gram, trace, largest))
        reach = math.sqrt(shift) + self.feature_error
        rows = self._factor("first", shift, part(self.report, 0, 0.5))
        if rows < n:
            # Rows of a leading factor are independent; with rounding inside the trunk that is not carried over.
            rank = rows if self.feature_error == 0 else 0
            return Proven(rank, self._bounded(0.0, 0.0, math.inf), sigma_max, reach)
        lower = lowest_eigenvalue(gram, shift) - error
        value, above = self._smallest(trace, error)
        closer = value * (1 - CLOSE) - error - rounding(gram, trace, largest)
        if closer > shift and self._factor("second", closer, part(self.report, 0.5, 0.5)) == n:
            lower = max(lower, lowest_eigenvalue(gram, closer) - error)
        sigma_min = self._bounded(math.sqrt(max(value, lower, 0.0)), math.sqrt(max(lower, 0.0)), math.sqrt(above))
        return Proven(n if sigma_min.lower > 0 else 0, sigma_min, sigma_max, reach)

    def _factor(self, name: str, shift: float, report: Report) -> int:
        """Rows that have a factor; what an earlier process had done is taken up."""
        noted = self.journal[name] or {"shift": shift, "columns": 0}
        if noted.get("rows") is not None and noted["shift"] == shift:
            return int(noted["rows"])
        done = noted["columns"] if noted["shift"] == shift else 0

        def save(columns: int) -> None:
            self.journal[name] = {"shift": shift, "columns": columns}

        rows = tiled_cholesky(self.gram, self.factor, shift, done=done, report=report, save=save)
        self.journal[name] = {"shift": shift, "columns": self.factor.count, "rows": rows}
        return rows

    def _smallest(self, trace: float, error: float) -> tuple[float, float]:
        """Rayleigh quotient next to lambda_min and an upper bound of lambda_min(G)."""
        if stored := self.journal["smallest"]:
            return stored[0], stored[1]

        def converged(krylov: Krylov) -> bool:
            if krylov.basis.shape[1] < 6:
                return False
            values, _, residuals = krylov.ritz()
            return float(residuals[-1]) <= 0.1 * CLOSE * float(values[-1])

        def inverse(columns: Tensor) -> Tensor:
            return solve(self.factor, columns) * trace  # of an ordinary size, whatever that of the features is

        n = self.gram.size
        krylov = lanczos(inverse, n, steps=min(STEPS, n), seed=0, device=torch.device("cpu"), stop=converged)
        # One more inverse iteration: what the Ritz vector has of large eigenvalues weighs lambda_max / lambda_min in G.
        vector = inverse(krylov.basis @ krylov.ritz()[1][:, -1:])
        value, slack = self._rayleigh(vector, trace, error)
        self.journal["smallest"] = [value, value + slack]
        return value, value + slack

    def _largest(self, trace: float, error: float) -> Bounded:
        """sigma_max from Lanczos below, and from the Frobenius norm of the rest (``complement_bound``), or the trace, above."""
        stored = self.journal["largest"]
        if not stored or len(stored) != 3:
            usual = 2.0**-900 < trace < 2.0**900  # otherwise the products could under- or overflow
            stored = self._by_lanczos(trace, error) if usual else [0.0, 0.0, trace]
            self.journal["largest"] = stored
        value, slack, above = stored
        above = min(above, trace) + error
        value = min(max(value, 0.0), trace)
        return self._bounded(math.sqrt(value), math.sqrt(max(value - slack, 0.0)), math.sqrt(above))

    def _by_lanczos(self, trace: float, error: float) -> list[float]:
        """Rayleigh quotient next to lambda_max(G), its error, and an upper bound of lambda_max of G as computed."""

        def converged(krylov: Krylov) -> bool:
            values, _, residuals = krylov.ritz()
            return float(residuals[-1]) <= RESIDUAL * float(values[-1])

        n, a = self.gram.size, Scaled.of(self.gram, trace)
        # Features of one sign have a top vector close to the ones; those of both signs may have one at a right angle to it.
        start = torch.ones(n, 1, dtype=torch.float64)
        start += 0.1 * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        krylov = lanczos(a.product, n, steps=min(LARGEST_STEPS, n), start=start, stop=converged)
        value, slack = self._rayleigh(krylov.basis @ krylov.ritz()[1][:, -1:], trace, error)
        return [value, slack, math.ldexp(complement_bound(a, krylov.basis), a.exponent)]

    def _rayleigh(self, vector: Tensor, trace: float, error: float) -> tuple[float, float]:
        """x^T G x / x^T x, computed, and how far that of the exact matrix may be from it."""
        vector = vector / vector.norm()
        value = float(vector.T @ self.gram.times(vector)) / float(vector.T @ vector)
        # |fl(x^T A x) - x^T A x| <= gamma_{2n+4} |x|^T |A| |x|, and |A|_F <= tr A for what is semidefinite up to its rounding;
        # denominator and division by a relative gamma_{n+1}, as in ``Symmetric.rayleigh``.
        n = self.gram.size
        slack = gamma(2 * n + 8, torch.float64) * (trace + 2 * error) + gamma(n + 4, torch.float64) * abs(value)
        return value, 1.01 * slack + error

    def _bounded(self, value: float, lower: float, upper: float) -> Bounded:
        """Bounds of a singular value: square roots rounded outwards, and the rounding inside the trunk allowed for."""
        proven = self.feature_error == 0
        method = METHOD + ("" if proven else " + estimated rounding inside the trunk")
        low = max(math.nextafter(lower, 0) - self.feature_error, 0.0)
        return Bounded(value, low, math.nextafter(upper, math.inf) + self.feature_error, proven, method)


@dataclass(frozen=True)
class Scaled:
    """2^-exponent G, of an ordinary size, as ``complement_bound`` takes it."""

    tiles: Tiles
    exponent: int
    norm: float
    """Upper bound of the Frobenius norm."""
    skew: float = 0.0
    """One triangle says everything."""

    @classmethod
    def of(cls, tiles: Tiles, trace: float) -> Scaled:
        """Of G with this trace, which is positive."""
        exponent, sums = math.frexp(trace)[1], 1 + gamma(tiles.size**2 + 3, torch.float64)
        return cls(tiles, exponent, tiles.norm(2.0**-exponent) * sums * OUTWARD)

    @property
    def size(self) -> int:
        """N."""
        return self.tiles.size

    def product(self, columns: Tensor) -> Tensor:
        """On columns (N, b)."""
        return self.tiles.times(columns) * 2.0**-self.exponent
