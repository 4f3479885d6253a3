"""Rank certificates for features that do not fit into memory, by verified Cholesky factors of a tiled Gram matrix."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lightning_conv.expressivity.certificate import Cost, RankCertificate, RankVerdict, too_narrow
from lightning_conv.expressivity.equal import SameInputs, closest_pair
from lightning_conv.expressivity.journal import Journal
from lightning_conv.expressivity.plan import StreamPlan, plan_stream
from lightning_conv.expressivity.proof import METHOD, Proof, Proven
from lightning_conv.expressivity.stream import FeatureRows, read_rows, stream_gram
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.reporting.progress import Report, part, progress_bar

PROBED = 64
"""Number of samples whose features are computed first, to measure the time per sample."""


def certify_streamed(
    source: FeatureRows,
    *,
    bias: bool = True,
    feature_error: float = 0.0,
    max_memory: float | None = None,
    folder: str | Path | None = None,
    tile: int | None = None,
    progress: bool | Report | None = None,
    same_inputs: SameInputs | None = None,
) -> RankCertificate:
    r"""Certify rank [h, 1] = n from Cholesky factors of G = h h^T + 1 1^T, where h is computed strip by strip.

    Let e be the proven rounding error of G (``gram_rounding``). A factor of G - t I proves a lower bound of lambda_min of
    the computed matrix (``lowest_eigenvalue``), and

    .. math:: \sigma_{\min}([h, 1])^2 \ge \lambda_{\min}(\hat G) - e .

    The first shift t lies just above both rounding errors, so the existence of a factor is the proof. Then inverse Lanczos
    finds sigma_min, whose Rayleigh quotient is an upper bound. A second factor right below it brings the lower bound to
    within a percent. Since G has the squared singular values, the proof reaches down to sigma_min / |h|_F of about 1e-6; the
    verdict is ``undecided`` below that.

    Args:
        source: last hidden features h of the n samples.
        bias: whether the last layer has a bias.
        feature_error: see ``certify_expressivity``.
        max_memory: bytes, such as ``2**30`` or ``1e9`` (default a quarter of the free memory).
        folder: folder of the matrices and the journal. A killed run resumes if it is called again with the same features and
            folder. The features are read once to check that they are the same bit for bit; if not, the computation starts
            again. None: nothing is kept.
        tile: rows per tile; None: chosen by ``plan_stream``.
        progress: see ``certify_expressivity``.
        same_inputs: see ``certify_expressivity``.

    Raises:
        MemoryError: two strips of features do not fit into ``max_memory``.
        OSError: the folder's disk has no room for the matrices.
        ValueError: the features are not finite, or ``max_memory`` is not a finite number of at least one byte.

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
        journal = Journal(path, {"samples": samples, "width": width, "tile": plan.tile, "bias": bias})
        gram, factor = (Tiles(samples, plan.tile, place and place / f"{name}.tiles") for name in ("gram", "factor"))
        if not _are_those_of(journal, source, gram):
            journal.stages.clear()

        def seen(row: int, features: Tensor) -> None:
            if path is not None:  # written to disk by the next ``save``
                journal.stages.setdefault("rows", {})[str(row)] = _fingerprint(features)

        # Share of the work that the Gram matrix takes, including the features.
        weight = 1 - 2 * samples**3 / 3 / plan.flops * (1 - plan.computed * row_seconds / plan.seconds)
        stream_gram(
            source,
            gram,
            bias=bias,
            panel=plan.panel,
            done=journal["gram"] or (0, 0, 0),
            report=part(report, 0, weight),
            save=lambda done: journal.__setitem__("gram", done),
            seen=seen,
        )
        proof = Proof(gram, factor, width, feature_error, journal, part(report, weight, 1 - weight))
        proven = proof.run()
        verdict, reason, sigma_min = _judge(source, gram, proven, feature_error, same_inputs)
    cost = Cost(time.perf_counter() - start, plan.flops, plan.bytes, plan.disk_bytes, plan.seconds)
    return RankCertificate(
        verdict, proven.rank, samples, width, "singular", reason, cost, sigma_min, proven.sigma_max, feature_error
    )


def _judge(
    source: FeatureRows, gram: Tiles, proven: Proven, feature_error: float, same_inputs: SameInputs | None
) -> tuple[RankVerdict, str, Bounded]:
    sigma_min, n = proven.sigma_min, gram.size
    if sigma_min.lower > 0:
        how = f"sigma_min = {sigma_min.value:.3e} is at least {sigma_min.lower:.3e}, by {METHOD}"
        return "certified", how, sigma_min
    pair = closest_pair(source, gram)
    # (e_i - e_j) / sqrt(2) is a unit vector, and the column of ones cancels.
    above = min(sigma_min.upper, pair.distance * (0.5**0.5 + 1e-9) + feature_error)
    sigma_min = replace(sigma_min, upper=above)
    rank = f"rank at least {proven.rank} of {n} is certified"
    if (equal := pair.refutes(feature_error, same_inputs)) is not None:
        return "refuted", f"{equal}, so rank [h, 1] < n = {n} ({rank}); remove duplicate samples", sigma_min
    return (
        "undecided",
        f"sigma_min is at most {above:.3e} and not proven to be positive: squares in float64 and the rounding inside the trunk "
        f"({feature_error:.1e}) leave open what is below about {proven.reach:.1e} ({rank}); the closest features are those of samples "
        f"{pair.first} and {pair.second}, at distance {pair.distance:.1e}; a sharper softplus or a wider last hidden layer raises "
        "sigma_min",
        sigma_min,
    )


@contextmanager
def _place(folder: Path | None, plan: StreamPlan) -> Iterator[Path | None]:
    """Provide the folder of the matrices; None means memory."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    elif plan.on_disk:
        with tempfile.TemporaryDirectory(prefix="expressivity-") as name:
            yield Path(name)
    else:
        yield None


def _row_seconds(source: FeatureRows) -> float:
    """Measure the time to compute the features of one sample."""
    count = min(PROBED, source.samples)
    read_rows(source, slice(0, 1))  # the first call may set things up
    start = time.perf_counter()
    read_rows(source, slice(0, count))
    return (time.perf_counter() - start) / count


def _are_those_of(journal: Journal, source: FeatureRows, gram: Tiles) -> bool:
    """Return whether the features equal those of the recorded work bit for bit."""
    noted = journal["rows"] or {}
    return all(_fingerprint(read_rows(source, gram.rows(int(row)))) == known for row, known in noted.items())


def _fingerprint(features: Tensor) -> str:
    return hashlib.sha256(features.reshape(-1).numpy().data).hexdigest()
