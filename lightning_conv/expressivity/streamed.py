"""Rank certificates for features that do not fit into memory, by verified Cholesky factors of a tiled Gram matrix."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_conv.expressivity.certificate import Cost, RankCertificate, RankVerdict, require_error, too_narrow
from lightning_conv.expressivity.equal import SameInputs, closest_pair
from lightning_conv.expressivity.factor import tiled_cholesky
from lightning_conv.expressivity.journal import Journal
from lightning_conv.expressivity.plan import StreamPlan, plan_stream
from lightning_conv.expressivity.practical import impractical
from lightning_conv.expressivity.proof import METHOD, Proof, Proven
from lightning_conv.expressivity.stream import FeatureRows, ScaledRows, read_rows, stream_gram
from lightning_conv.expressivity.team import Team
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.eigenvalues.symmetric import rescaled
from lightning_conv.linalg.rounding import exponent_of, ldexp_up, product_up, sum_up
from lightning_conv.machine.memory import allowed_memory
from lightning_conv.machine.processes import Processes
from lightning_conv.reporting.progress import Report, part, progress_bar

SMALLEST, LARGEST = 2.0**-400, 2.0**400
"""Range of the largest diagonal entry of the Gram matrix outside which the features are scaled by a power of two."""
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
    processes: Processes | None = None,
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
        processes: see ``certify_expressivity``.

    Raises:
        MemoryError: two strips of features do not fit into ``max_memory``.
        OSError: the folder's disk has no room for the matrices.
        ValueError: the features are not finite, or ``max_memory`` is not a finite number of at least one byte.

    Cost: n^2 m_H + 2 n^3 / 3 flops, of which each of W processes has 1 / W; see ``plan_stream``.

    Source: Rump 2006; Higham 2002, chapter 10; Kawaguchi & Sun 2021 for the condition.
    """
    require_error(feature_error)
    samples, width = source.samples, source.width
    if (narrow := too_narrow(samples, width, bias=bias)) is not None:
        nothing = Bounded(0.0, 0.0, 0.0, True, "fewer columns than rows")
        return RankCertificate("refuted", 0, samples, width, "singular", narrow, Cost(0.0, 0.0, 0.0), nothing)
    if processes is not None:
        team = Team(processes, source)
        allowed = processes.gather(allowed_memory(max_memory, torch.device("cpu")))
        memory = min(allowed) // (1 if max_memory is not None else processes.world)
        options = _Options(bias, feature_error, memory, folder, tile, progress, same_inputs)
        return team.run(lambda: _certified(team.rows, options, team))
    return _certified(source, _Options(bias, feature_error, max_memory, folder, tile, progress, same_inputs))


@dataclass(frozen=True)
class _Options:
    """Arguments of ``certify_streamed``."""

    bias: bool
    feature_error: float
    max_memory: float | None
    folder: str | Path | None
    tile: int | None
    progress: bool | Report | None
    same_inputs: SameInputs | None


def _certified(source: FeatureRows, options: _Options, team: Team | None = None) -> RankCertificate:
    start = time.perf_counter()
    bias, feature_error, samples, width = options.bias, options.feature_error, source.samples, source.width
    path = None if options.folder is None else Path(options.folder)
    row_seconds = _row_seconds(source)
    plan = plan_stream(
        samples,
        width,
        max_memory=options.max_memory,
        folder=path,
        tile=options.tile,
        row_seconds=row_seconds,
        processes=1 if team is None else team.world,
    )
    with _place(path, plan) as place, progress_bar(str(plan), plan.seconds, options.progress) as report:
        journal = Journal(path, {"samples": samples, "width": width, "tile": plan.tile, "bias": bias})
        gram, factor = (Tiles(samples, plan.tile, place and place / f"{name}.tiles") for name in ("gram", "factor"))
        if not _are_those_of(journal, source, gram):
            journal.stages.clear()

        def seen(row: int, features: Tensor) -> None:
            if path is not None:  # written to disk by the next ``save``
                journal.stages.setdefault("rows", {})[str(row)] = _fingerprint(features)

        # Share of the work that the Gram matrix takes, including the features.
        weight = 1 - 2 * samples**3 / 3 / plan.flops * (1 - plan.computed * row_seconds / plan.seconds)

        def fill(exponent: int) -> None:
            scaled = partial(stream_gram, ScaledRows(source, -exponent) if exponent else source)
            (scaled if team is None else partial(team.gram, exponent=-exponent))(
                gram,
                bias=bias,
                panel=plan.panel,
                ones=math.ldexp(1.0, -2 * exponent) if bias else 0.0,  # the features are then large, if they are scaled
                done=journal["gram"] or (0, 0, 0),
                report=part(report, 0, weight),
                save=lambda done: journal.__setitem__("gram", done),
                seen=(lambda row, features: None) if exponent else seen,
            )

        exponent = int(journal["scale"])
        fill(exponent)
        if exponent == 0 and not SMALLEST <= float(gram.diagonal().max()) <= LARGEST:
            exponent = _largest_exponent(source, gram)
            if exponent:
                journal.stages.pop("gram", None)
                journal["scale"] = exponent
                fill(exponent)
        error = ldexp_up(feature_error, -exponent)
        cholesky = tiled_cholesky if team is None else team.cholesky
        proven = Proof(gram, factor, width, error, journal, part(report, weight, 1 - weight), cholesky).run()
        proven = replace(
            proven,
            sigma_min=rescaled(proven.sigma_min, exponent),
            sigma_max=rescaled(proven.sigma_max, exponent),
            reach=ldexp_up(proven.reach, exponent),
        )
        judged = _judge(source, gram, proven, feature_error, options.same_inputs)
    cost = Cost(time.perf_counter() - start, plan.flops, plan.bytes, plan.disk_bytes, plan.seconds)
    return RankCertificate(
        judged.verdict,
        proven.rank,
        samples,
        width,
        "singular",
        judged.reason,
        cost,
        judged.sigma_min,
        proven.sigma_max,
        feature_error,
        at_these_weights=judged.at_these_weights,
    )


@dataclass(frozen=True)
class _Judgement:
    verdict: RankVerdict
    reason: str
    sigma_min: Bounded
    at_these_weights: bool = False


def _judge(
    source: FeatureRows, gram: Tiles, proven: Proven, feature_error: float, same_inputs: SameInputs | None
) -> _Judgement:
    sigma_min, n = proven.sigma_min, gram.size
    if proven.rank == n:
        how = f"sigma_min = {sigma_min.value:.3e} is at least {sigma_min.lower:.3e}, by {METHOD}"
        return _Judgement("certified", how + impractical(proven.sigma_max.value, sigma_min.value), sigma_min)
    pair = closest_pair(source, gram)
    # (e_i - e_j) / sqrt(2) is a unit vector, and the column of ones cancels.
    above = min(sigma_min.upper, sum_up(product_up(pair.distance, 0.5**0.5 + 1e-9), feature_error))
    # Not ``replace``: an interval without an upper end was not certified.
    sigma_min = Bounded(min(sigma_min.value, above), sigma_min.lower, above, feature_error == 0, sigma_min.method)
    rank = f"rank at least {proven.rank} of {n} is certified"
    if (found := pair.refutes(feature_error, same_inputs)) is not None:
        reason = found.reason(f"rank [h, 1] < n = {n} ({rank})")
        return _Judgement("refuted", reason, sigma_min, found.at_these_weights)
    return _Judgement(
        "undecided",
        f"sigma_min is at most {above:.3e} and not proven to be positive: squares in float64 and the rounding inside the trunk "
        f"({feature_error:.1e}) leave open what is below about {proven.reach:.1e} ({rank}); the closest features are those of samples "
        f"{pair.first} and {pair.second}, at distance {pair.distance:.1e}; a sharper softplus or a wider last hidden layer raises "
        "sigma_min",
        sigma_min,
    )


def _largest_exponent(source: FeatureRows, gram: Tiles) -> int:
    """Return the exponent of the largest feature, in one pass."""
    return max(
        (exponent_of(h) for h in (read_rows(source, gram.rows(row)) for row in range(gram.count)) if bool(h.any())),
        default=0,
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
