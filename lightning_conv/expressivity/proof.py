"""Proven bounds of singular values from a tiled Gram matrix, by two verified Cholesky factors and inverse Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.expressivity.factor import lowest_eigenvalue, rounding, solve, tiled_cholesky
from lightning_conv.expressivity.journal import Journal
from lightning_conv.expressivity.stream import gram_rounding
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.largest import complement_bound
from lightning_conv.linalg.eigenvalues.symmetric import OUTWARD
from lightning_conv.linalg.lanczos import Krylov, lanczos
from lightning_conv.linalg.rounding import gamma, root_down, root_up, sum_down, sum_up
from lightning_conv.reporting.progress import Report, part

STEPS = 40
CLOSE = 0.01
"""Relative distance of the second shift from the Rayleigh quotient; it determines sigma_min to half of that."""

LARGEST_STEPS = 12
"""Number of products with G that sigma_max may take."""
RESIDUAL = 1e-4
"""Relative residual of the largest Ritz value; the upper bound exceeds it by about the square, 1e-8."""

METHOD = "verified Cholesky of the tiled float64 Gram matrix"


@dataclass(frozen=True)
class Proven:
    """Bounds of [h, 1] that the Cholesky factors prove."""

    rank: int  # lower bound
    sigma_min: Bounded  # the n-th singular value; the upper bound is infinite if the first factor failed
    sigma_max: Bounded
    reach: float  # smallest sigma_min that can be proven despite rounding


@dataclass(frozen=True)
class Proof:
    """Computation of the bounds of [h, 1] from its Gram matrix.

    Args:
        gram: computed Gram matrix G, in tiles.
        factor: tiles that receive the factors.
        width: m_H, on which the rounding of G depends.
        feature_error: see ``certify_expressivity``.
        journal: record of the finished parts.
        report: called with the share of the work that is done.
        cholesky: ``tiled_cholesky``, or what divides it among processes.
    """

    gram: Tiles
    factor: Tiles
    width: int
    feature_error: float
    journal: Journal
    report: Report
    cholesky: Callable[..., int] = tiled_cholesky

    def run(self) -> Proven:
        """Compute the bounds: the first factor proves the rank, the second one sharpens sigma_min to within a percent."""
        gram, n = self.gram, self.gram.size
        diagonal = gram.diagonal()
        trace, largest = float(diagonal.sum()), float(diagonal.max())
        error = gram_rounding(gram, self.width)
        sigma_max = self._largest(trace, error)
        # Just large enough for a success to prove lambda_min > 0 of the exact matrix.
        shift = 1.05 * (error + rounding(gram, trace, largest))
        reach = math.sqrt(shift) + self.feature_error
        rows = self._factor("first", shift, part(self.report, 0, 0.5))
        if rows < n:
            # The rows of a leading factor are independent. With rounding inside the trunk this does not carry over.
            rank = rows if self.feature_error == 0 else 0
            return Proven(rank, self._bounded(0.0, 0.0, math.inf), sigma_max, reach)
        lower = sum_down(lowest_eigenvalue(gram, shift), -error)
        value, above = self._smallest(trace, error)
        closer = value * (1 - CLOSE) - error - rounding(gram, trace, largest)
        if closer > shift and self._factor("second", closer, part(self.report, 0.5, 0.5)) == n:
            lower = max(lower, sum_down(lowest_eigenvalue(gram, closer), -error))
        sigma_min = self._bounded(math.sqrt(max(value, lower, 0.0)), root_down(max(lower, 0.0)), root_up(above))
        return Proven(n if sigma_min.lower > 0 else 0, sigma_min, sigma_max, reach)

    def _factor(self, name: str, shift: float, report: Report) -> int:
        """Return the number of rows that have a factor; continue the work of an earlier process."""
        noted = self.journal[name] or {"shift": shift, "columns": 0}
        if noted.get("rows") is not None and noted["shift"] == shift:
            return int(noted["rows"])
        done = noted["columns"] if noted["shift"] == shift else 0

        def save(columns: int) -> None:
            self.journal[name] = {"shift": shift, "columns": columns}

        rows = self.cholesky(self.gram, self.factor, shift, done=done, report=report, save=save)
        self.journal[name] = {"shift": shift, "columns": self.factor.count, "rows": rows}
        return rows

    def _smallest(self, trace: float, error: float) -> tuple[float, float]:
        """Return a Rayleigh quotient close to lambda_min, and an upper bound of lambda_min(G)."""
        if stored := self.journal["smallest"]:
            return stored[0], stored[1]

        def converged(krylov: Krylov) -> bool:
            if krylov.basis.shape[1] < 6:
                return False
            values, _, residuals = krylov.ritz()
            return float(residuals[-1]) <= 0.1 * CLOSE * float(values[-1])

        def inverse(columns: Tensor) -> Tensor:
            return solve(self.factor, columns) * trace  # scaled to an ordinary size

        n = self.gram.size
        krylov = lanczos(inverse, n, steps=min(STEPS, n), seed=0, device=torch.device("cpu"), stop=converged)
        # One more inverse iteration, because G amplifies the Ritz vector's components of large eigenvalues.
        vector = inverse(krylov.basis @ krylov.ritz()[1][:, -1:])
        value, slack = self._rayleigh(vector, trace, error)
        self.journal["smallest"] = [value, sum_up(value, slack)]
        return value, sum_up(value, slack)

    def _largest(self, trace: float, error: float) -> Bounded:
        """Bound sigma_max by Lanczos from below, and from above by ``complement_bound`` or the trace."""
        stored = self.journal["largest"]
        if not stored or len(stored) != 3:
            usual = 2.0**-900 < trace < 2.0**900  # outside, the products could under- or overflow
            stored = self._by_lanczos(trace, error) if usual else [0.0, 0.0, trace]
            self.journal["largest"] = stored
        value, slack, above = stored
        above = sum_up(min(above, trace), error)
        value = min(max(value, 0.0), trace)
        return self._bounded(math.sqrt(value), root_down(max(sum_down(value, -slack), 0.0)), root_up(above))

    def _by_lanczos(self, trace: float, error: float) -> list[float]:
        """Return a Rayleigh quotient close to lambda_max(G), its error, and an upper bound of lambda_max of G as computed."""

        def converged(krylov: Krylov) -> bool:
            values, _, residuals = krylov.ritz()
            return float(residuals[-1]) <= RESIDUAL * float(values[-1])

        n, a = self.gram.size, Scaled.of(self.gram, trace)
        # Features of one sign have a top vector close to the ones; with both signs it may be orthogonal to them.
        start = torch.ones(n, 1, dtype=torch.float64)
        start += 0.1 * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        krylov = lanczos(a.product, n, steps=min(LARGEST_STEPS, n), start=start, stop=converged)
        value, slack = self._rayleigh(krylov.basis @ krylov.ritz()[1][:, -1:], trace, error)
        return [value, slack, math.ldexp(complement_bound(a, krylov.basis), a.exponent)]

    def _rayleigh(self, vector: Tensor, trace: float, error: float) -> tuple[float, float]:
        """Compute x^T G x / x^T x, and bound its distance from the quotient of the exact matrix."""
        vector = vector / vector.norm()
        value = float(vector.T @ self.gram.times(vector)) / float(vector.T @ vector)
        # |fl(x^T A x) - x^T A x| <= gamma_{2n+4} |x|^T |A| |x|, and |A|_F <= tr A for a matrix that is semidefinite up to
        # rounding; denominator and division add a relative gamma_{n+1}, as in ``Symmetric.rayleigh``.
        n = self.gram.size
        slack = gamma(2 * n + 8, torch.float64) * (trace + 2 * error) + gamma(n + 4, torch.float64) * abs(value)
        return value, 1.01 * slack + error

    def _bounded(self, value: float, lower: float, upper: float) -> Bounded:
        """Round the bounds of a singular value outwards, and allow for the rounding inside the trunk."""
        proven = self.feature_error == 0
        method = METHOD + ("" if proven else " + estimated rounding inside the trunk")
        low = max(sum_down(lower, -self.feature_error), 0.0)
        return Bounded(value, low, sum_up(upper, self.feature_error), proven, method)


@dataclass(frozen=True)
class Scaled:
    """Matrix 2^-exponent G, whose trace is near 1, with the interface that ``complement_bound`` expects."""

    tiles: Tiles
    exponent: int
    norm: float
    """Upper bound of the Frobenius norm."""
    skew: float = 0.0
    """Zero, because only one triangle is stored."""

    @classmethod
    def of(cls, tiles: Tiles, trace: float) -> Scaled:
        """Scale G by its trace, which must be positive."""
        exponent, sums = math.frexp(trace)[1], 1 + gamma(tiles.size**2 + 3, torch.float64)
        return cls(tiles, exponent, tiles.norm(2.0**-exponent) * sums * OUTWARD)

    @property
    def size(self) -> int:
        """Number of rows N."""
        return self.tiles.size

    def product(self, columns: Tensor) -> Tensor:
        """Multiply columns (N, b) by the matrix."""
        return self.tiles.times(columns) * 2.0**-self.exponent
