"""Rank certificates for features that do not fit into memory: a Gram matrix in tiles and verified Cholesky factors of it."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_conv.eigenvalues.bounded import Bounded
from lightning_conv.expressivity.certificate import Cost, RankCertificate, RankVerdict, too_narrow
from lightning_conv.expressivity.factor import lowest_eigenvalue, rounding, solve, tiled_cholesky
from lightning_conv.expressivity.journal import Journal
from lightning_conv.expressivity.plan import StreamPlan, plan_stream
from lightning_conv.expressivity.stream import FeatureRows, gram_rounding, read_rows, stream_gram
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.kernels.precision import gamma
from lightning_conv.lanczos import Krylov, lanczos
from lightning_conv.progress import Report, part, progress_bar

STEPS = 40
PROBED = 64
"""Samples whose features are computed beforehand, to know what a sample takes."""
CLOSE = 0.01
"""Relative distance of the second shift from the Rayleigh quotient: sigma_min is then known to half of that."""

METHOD = "verified Cholesky of the tiled float64 Gram matrix"


def certify_streamed(
    source: FeatureRows,
    *,
    bias: bool = True,
    feature_error: float = 0.0,
    max_memory: int | None = None,
    folder: str | Path | None = None,
    tile: int | None = None,
    progress: bool | Report | None = None,
) -> RankCertificate:
    r"""Certify rank [h, 1] = n from Cholesky factors of G = h h^T + 1 1^T, with h computed strip by strip and never held.

    With e the proven rounding of G (``gram_rounding``) and the lower bound of lambda_min of the computed matrix that a factor
    of G - t I proves (``lowest_eigenvalue``),

    .. math:: \sigma_{\min}([h, 1])^2 \ge \lambda_{\min}(\hat G) - e .

    The first shift t lies just above what both roundings leave open, so a factor is the proof. Then inverse Lanczos finds
    sigma_min (Rayleigh quotient: upper bound), and a second factor right below it brings the lower bound to within a percent.
    The proof reaches down to sigma_min / |h|_F of about 1e-6 and no further, squares being what they are; ``undecided`` below.

    Args:
        source: h.
        bias: whether a bias comes along.
        feature_error: see ``certify_expressivity``.
        max_memory: bytes (default a quarter of what is free).
        folder: where the matrices and the journal are kept. A run that was killed goes on where it was when it is called
            with the same features and folder. None: nothing is kept.
        tile: rows of a tile.
        progress: see ``certify_expressivity``.

    Raises:
        MemoryError: two strips of features do not fit into ``max_memory``.
        ValueError: features that are not finite.

    Cost: n^2 m_H + 2 n^3 / 3 flops; see ``plan_stream``.

    Source: Rump 2006; Higham 2002, chapter 10; Kawaguchi & Sun 2021 for the condition.
    """
    start = time.perf_counter()
    samples, width = source.samples, source.width
    if (narrow := too_narrow(samples, width, bias=bias)) is not None:
        nothing = Bounded(0.0, 0.0, 0.0, True, "fewer columns than rows")
        return RankCertificate("refuted", 0, samples, width, "singular", narrow, Cost(0.0, 0.0, 0.0), nothing)
    path = None if folder is None else Path(folder)
    row_seconds = _row_seconds(source)
    plan = plan_stream(samples, width, max_memory=max_memory, folder=path, tile=tile, row_seconds=row_seconds)
    with _place(path, plan) as place, progress_bar(str(plan), plan.seconds, progress) as report:
        journal = Journal(path, _identity(source, plan, bias))
        gram, factor = (Tiles(samples, plan.tile, place and place / f"{name}.tiles") for name in ("gram", "factor"))
        # The share of the Gram matrix, the features included.
        weight = 1 - 2 * samples**3 / 3 / plan.flops * (1 - plan.computed * row_seconds / plan.seconds)
        stream_gram(
            source, gram, bias=bias, panel=plan.panel, done=journal["gram"] or (0, 0, 0), report=part(report, 0, weight),
            save=lambda done: journal.__setitem__("gram", done),
        )  # fmt: skip
        proof = _Proof(gram, factor, width, feature_error, journal, part(report, weight, 1 - weight))
        verdict, rank, sigma_min, sigma_max, reason = proof.run()
    cost = Cost(time.perf_counter() - start, plan.flops, plan.bytes, plan.disk_bytes, plan.seconds)
    return RankCertificate(verdict, rank, samples, width, "singular", reason, cost, sigma_min, sigma_max, feature_error)


@dataclass(frozen=True)
class _Proof:
    """From the Gram matrix to the bounds."""

    gram: Tiles
    factor: Tiles
    width: int
    feature_error: float
    journal: Journal
    report: Report

    def run(self) -> tuple[RankVerdict, int, Bounded, Bounded, str]:
        gram, n = self.gram, self.gram.size
        diagonal = gram.diagonal()
        trace, largest = float(diagonal.sum()), float(diagonal.max())
        error = gram_rounding(gram, self.width)
        sigma_max = self._bounded(math.sqrt(trace), 0.0, math.sqrt(trace + error))
        # Just so that a success proves lambda_min > 0 of the exact matrix.
        shift = 1.05 * (error + rounding(gram, trace, largest))
        rows = self._factor("first", shift, part(self.report, 0, 0.5))
        if rows < n:
            sigma_min = self._bounded(0.0, 0.0, math.inf)
            return (
                "undecided",
                self._rank(rows),
                sigma_min,
                sigma_max,
                (
                    f"the Gram matrix is not proven definite beyond its rounding: sigma_min is below about {math.sqrt(shift):.1e} "
                    f"(rank at least {self._rank(rows)} of {n} is certified)"
                ),
            )
        lower = lowest_eigenvalue(gram, shift) - error
        value, above = self._rayleigh(error)
        closer = value * (1 - CLOSE) - error - rounding(gram, trace, largest)
        if closer > shift and self._factor("second", closer, part(self.report, 0.5, 0.5)) == n:
            lower = max(lower, lowest_eigenvalue(gram, closer) - error)
        sigma_min = self._bounded(math.sqrt(max(value, lower, 0.0)), math.sqrt(max(lower, 0.0)), math.sqrt(above))
        if sigma_min.lower > 0:
            return (
                "certified",
                n,
                sigma_min,
                sigma_max,
                (f"sigma_min = {sigma_min.value:.3e} is at least {sigma_min.lower:.3e}, by {METHOD}"),
            )
        return (
            "undecided",
            0,
            sigma_min,
            sigma_max,
            (f"sigma_min = {sigma_min.value:.3e} is not above the rounding inside the trunk, {self.feature_error:.1e}"),
        )

    def _rank(self, rows: int) -> int:
        """Rows of a leading factor are independent; with rounding inside the trunk that is not carried over."""
        return rows if self.feature_error == 0 else 0

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

    def _rayleigh(self, error: float) -> tuple[float, float]:
        """Rayleigh quotient next to lambda_min and an upper bound of lambda_min(G)."""
        if stored := self.journal["rayleigh"]:
            return stored[0], stored[1]

        def converged(krylov: Krylov) -> bool:
            if krylov.basis.shape[1] < 6:
                return False
            values, _, residuals = krylov.ritz()
            return float(residuals[-1]) <= 0.1 * CLOSE * float(values[-1])

        n, trace = self.gram.size, float(self.gram.diagonal().sum())

        def inverse(columns: torch.Tensor) -> torch.Tensor:
            return solve(self.factor, columns) * trace  # of an ordinary size, whatever that of the features is

        krylov = lanczos(
            inverse, n, steps=min(STEPS, n), seed=0, device=torch.device("cpu"), stop=converged,
        )  # fmt: skip
        # One more inverse iteration: what the Ritz vector has of large eigenvalues weighs lambda_max / lambda_min in G.
        vector = inverse(krylov.basis @ krylov.ritz()[1][:, -1:])
        vector /= vector.norm()
        value = float(vector.T @ self.gram.times(vector)) / float(vector.T @ vector)
        # |fl(x^T A x) - x^T A x| <= gamma_{2n+4} |x|^T |A| |x|, and |A|_F <= tr A for what is semidefinite up to its rounding.
        slack = 1.01 * gamma(2 * n + 8, torch.float64) * (trace + 2 * error)
        self.journal["rayleigh"] = [value, value + slack + error]
        return value, value + slack + error

    def _bounded(self, value: float, lower: float, upper: float) -> Bounded:
        """Bounds of a singular value: square roots rounded outwards, and the rounding inside the trunk allowed for."""
        proven = self.feature_error == 0
        method = METHOD + ("" if proven else " + estimated rounding inside the trunk")
        low = max(math.nextafter(lower, 0) - self.feature_error, 0.0)
        return Bounded(value, low, math.nextafter(upper, math.inf) + self.feature_error, proven, method)


@contextmanager
def _place(folder: Path | None, plan: StreamPlan) -> Iterator[Path | None]:
    """Where the matrices go."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    elif plan.on_disk:
        with tempfile.TemporaryDirectory(prefix="expressivity-") as name:
            yield Path(name)
    else:
        yield None


def _row_seconds(source: FeatureRows) -> float:
    """What computing the features of one sample takes, from some of them."""
    count = min(PROBED, source.samples)
    read_rows(source, slice(0, 1))  # whatever is set up the first time
    start = time.perf_counter()
    read_rows(source, slice(0, count))
    return (time.perf_counter() - start) / count


def _identity(source: FeatureRows, plan: StreamPlan, bias: bool) -> dict[str, object]:
    """What the work in a folder belongs to: the shape, the cut, and a few rows of the features themselves."""
    digest = hashlib.sha256()
    for row in sorted({0, source.samples // 3, source.samples // 2, source.samples - 1}):
        digest.update(read_rows(source, slice(row, row + 1)).contiguous().numpy().tobytes())
    return {
        "samples": source.samples, "width": source.width, "tile": plan.tile, "bias": bias,
        "features": digest.hexdigest(),
    }  # fmt: skip
