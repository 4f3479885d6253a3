"""``certify_expressivity``: the expressivity condition, certified by the method that fits the size.

After Kawaguchi & Sun 2021 (2104.05785): with last hidden features h (n x m_H), the condition is rank [h, 1] = n, where
the column of ones stands for the bias. Features that are real-analytic in the trunk's weights satisfy it for almost every
weight if they satisfy it at one weight. So one certified rank proves the condition for this architecture and these data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_conv.checked import checked
from lightning_conv.expressivity.alignment import certify_alignment
from lightning_conv.expressivity.certificate import RankCertificate, require_features, too_narrow, watched
from lightning_conv.expressivity.decomposition import decomposition_bytes
from lightning_conv.expressivity.distinct import certify_distinct
from lightning_conv.expressivity.singular import certify_held, feature_rounding, narrow_rounding
from lightning_conv.expressivity.stream import FeatureRows, HeldRows, read_rows
from lightning_conv.expressivity.streamed import certify_streamed
from lightning_conv.machine.memory import allowed_memory, mebibytes
from lightning_conv.machine.processes import Processes, alone
from lightning_conv.networks.narrowing import NarrowedError
from lightning_conv.reporting.progress import Report

Method: TypeAlias = Literal["auto", "singular", "distinct", "alignment"]

HELD_UP_TO = 2048
"""Number of samples or features up to which all singular values may be computed."""
SINGULAR_UP_TO = 20_000
"""Number of samples up to which ``"auto"`` certifies the current weights: some minutes (60,000 take an hour or more)."""
FEW = 512
"""Number of samples up to which all singular values are computed at once. Beyond, the Cholesky factors are tried first."""


@checked()
def certify_expressivity(
    features: Tensor | FeatureRows,
    *,
    method: Method = "auto",
    bias: bool = True,
    recompute: Callable[[], Tensor] | None = None,
    feature_error: float = 0.0,
    same_inputs: Callable[[int, int], bool] | None = None,
    entering: Tensor | None = None,
    targets: Tensor | None = None,
    max_memory: float | None = None,
    folder: str | Path | None = None,
    progress: bool | Report | None = None,
    narrow: str | None = None,
    processes: Processes | None = None,
) -> RankCertificate:
    """Certify that the last hidden features h of the whole training set let the last layer reach every target.

    - ``"singular"``: rank [h, 1] = n at the current weights. The proof uses verified Cholesky factors of the Gram matrix,
      strip by strip (``certify_streamed``). For at most 512 samples, and up to 2,048 where the factors leave the rank
      undecided, it uses all singular values (``certify_held``).
    - ``"distinct"``: rank n for almost every weight of a wide last hidden layer, because the inputs of that layer are
      distinct (``certify_distinct``).
    - ``"alignment"``: for heads narrower than n, the weaker condition that depends on the targets (``certify_alignment``).
    - ``"auto"``: alignment if the head is too narrow and there are targets; distinct beyond 20,000 samples if ``entering``
      is given; otherwise singular.

    Args:
        features: h, (n, m_H), one row per training sample, the inputs of the last linear layer. Either float64, or float32
            with ``recompute``, or ``FeatureRows``, which are computed strip by strip and never held in memory at once.
        method: method of the list above.
        bias: whether the last layer has a trainable bias; without one the matrix is h alone.
        recompute: function that returns the same features from a float64 copy of the trunk. It is called if ``features``
            are not float64, because a float32 rank says nothing: rounding fills every direction to about 1e-7 of the
            largest.
        feature_error: Frobenius norm of the change that rounding inside the trunk may have made to float64 features (for
            ``"distinct"``, to ``entering``). With ``recompute`` it is estimated as 16 * 2^-29 |h_32 - h_64|_F, the measured
            float32 error scaled by the ratio of the unit roundoffs, with a safety factor of 16. With zero the certificate
            is about the matrix as given.
        same_inputs: function that tells whether samples i and j are the same input. It is asked about the two closest rows
            if rank n is not certified: equal inputs refute rank n whatever the weights, equal features at these weights.
        entering: inputs of the last hidden layer, (n, d), float64; required for ``"distinct"``.
        targets: Y, (n, C), required for ``"alignment"``; class numbers count as one-hot rows.
        max_memory: bytes that may be used, such as ``2**30`` or ``1e9``, in addition to ``features``, ``entering`` and the
            computation of rows (default a quarter of the free memory). Matrices that do not fit go to ``folder`` or to a
            temporary one. ``"distinct"`` takes a few times the memory of ``entering`` in any case.
        folder: folder for the matrices of the factors and for a journal. After a kill, the same call resumes from the journal.
        progress: whether to show a bar on standard error with the predicted time; None: on a terminal, if it takes long. A
            function is called with the share that is done, 0 to 1, instead of a bar, for instance to write it to a log.
        narrow: where the computation of the features left float64, as ``NarrowWatch`` found it; empty: nowhere; None: not watched.
            If it names a place, nothing is certified (``watched``), and ``feature_error`` should allow for the narrow type. With
            ``recompute`` it is taken from the ``NarrowedError`` that ``last_hidden_features`` raises.
        processes: those among which the tiles of the Gram matrix and of its factors are divided. All of them call with the same features,
            or with rows that all compute together, and get the same certificate, that of one process to the last bit. The first one keeps
            ``folder``, and does alone what takes n^2 flops and all singular values; let ``Processes(timeout=)`` allow for that.

    Returns:
        The certificate. ``certified``: rank n is proven (up to ``feature_error``). ``refuted``: the rank is not n, because
        the head is too narrow, or two samples, which are named, are equal or have equal features; the latter is about these
        weights only (``at_these_weights``). ``undecided``: sigma_min is not above its
        rounding bound; the two closest rows are named. The field ``cost`` has the actual and the predicted cost.

    Raises:
        ValueError: the features are empty, not a matrix or not finite, the method is unknown or lacks an argument,
            ``feature_error`` is negative or NaN, or ``max_memory`` is not a finite number of at least one byte.
        TypeError: the features are float32 and ``recompute`` is missing.
        MemoryError: ``max_memory`` does not suffice.
        OSError: a disk has no room for the matrices.

    Example:
        >>> import torch
        >>> certificate = certify_expressivity(torch.eye(4, 3, dtype=torch.float64))  # 3 features and the bias column
        >>> certificate.verdict, certificate.rank_lower
        ('certified', 4)
    """
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is not one of {', '.join(get_args(Method))}")
    once, allowed = alone, allowed_memory(max_memory, torch.device("cpu"))
    if processes is not None:
        once, allowed = processes.once, min(processes.gather(allowed))
    if isinstance(features, Tensor):
        features, feature_error, narrow = _in_float64(features, recompute, feature_error, narrow)
    samples, width = features.shape if isinstance(features, Tensor) else (features.samples, features.width)
    if method == "auto":
        method = chosen(samples, width, bias, entering is not None, targets is not None)
    if method == "distinct":
        if entering is None:
            raise ValueError(
                'entering: None; method="distinct" needs the inputs of the last hidden layer, (n, d) in float64'
            )
        if entering.dtype != torch.float64 or len(entering) != samples:
            raise ValueError(
                f"entering: {entering.dtype} of shape {tuple(entering.shape)}; need float64 with a row for each of {samples} samples"
            )
        distinct = partial(
            certify_distinct, bias=bias, feature_error=feature_error, same_inputs=same_inputs, progress=progress
        )
        return watched(once(partial(distinct, entering, width)), narrow)
    need = decomposition_bytes(samples, width)
    fits = need <= allowed
    if method == "alignment":
        if targets is None:
            raise ValueError(
                'targets: None; method="alignment" needs the targets of the samples, (n, C) or class numbers'
            )
        if not fits:
            raise MemoryError(
                f"max_memory: the decomposition of {samples} x {width} features takes {mebibytes(need)}; allow that, or use fewer samples"
            )
        aligned = partial(certify_alignment, _held(features), targets, bias=bias, feature_error=feature_error)
        return watched(once(aligned), narrow)
    held = fits and is_held(samples, width, bias=bias)
    if held:
        features = _held(features)
    if not held or (samples > FEW and too_narrow(samples, width, bias=bias) is None):
        certificate = certify_streamed(
            HeldRows(features) if isinstance(features, Tensor) else features,
            bias=bias,
            feature_error=feature_error,
            max_memory=max_memory,
            folder=folder,
            progress=progress,
            same_inputs=same_inputs,
            processes=processes,
        )
        if not held or certificate.verdict != "undecided":
            return watched(certificate, narrow)
    assert isinstance(features, Tensor)
    decomposed = partial(certify_held, features, bias=bias, feature_error=feature_error, same_inputs=same_inputs)
    return watched(once(decomposed), narrow)


def chosen(samples: int, width: int, bias: bool, entering: bool, targets: bool) -> Method:
    """Return the method that ``"auto"`` selects."""
    if too_narrow(samples, width, bias=bias) is not None:
        return "alignment" if targets else "singular"
    return "distinct" if entering and samples > SINGULAR_UP_TO else "singular"


def _held(features: Tensor | FeatureRows) -> Tensor:
    return features if isinstance(features, Tensor) else read_rows(features, slice(0, features.samples))


def is_held(samples: int, width: int, *, bias: bool) -> bool:
    """Return whether ``"singular"`` may use all singular values: for small matrices, and for narrow ones to get their rank."""
    return min(samples, width) <= HELD_UP_TO or too_narrow(samples, width, bias=bias) is not None


def _in_float64(
    features: Tensor, recompute: Callable[[], Tensor] | None, feature_error: float, narrow: str | None
) -> tuple[Tensor, float, str | None]:
    """Return the features in float64, the allowance for their rounding, and where their computation left float64."""
    require_features(features)
    if features.dtype == torch.float64:
        return features, feature_error, narrow
    if recompute is None:
        raise TypeError(
            f"features: {features.dtype}; a rank needs float64 features from a float64 copy of the trunk: pass recompute=, or "
            "use last_hidden_features(..., dtype=torch.float64)"
        )
    narrowing = None
    try:
        exact = recompute()
    except NarrowedError as error:
        exact, narrowing = error.features, error.narrowing
    require_features(exact)
    if exact.dtype != torch.float64 or exact.shape != features.shape:
        raise TypeError(
            f"recompute: returned {exact.dtype} of shape {tuple(exact.shape)}; need float64 of {tuple(features.shape)}"
        )
    if narrowing is not None:
        return exact, narrow_rounding(features, exact, narrowing.unit), str(narrowing)
    return exact, feature_rounding(features, exact), narrow
