"""The expressivity condition, certified by whichever method the size asks for: ``certify_expressivity``.

After Kawaguchi & Sun 2021 (2104.05785): with last hidden features h (n x m_H), the condition is rank [h, 1] = n, the
bias column included. Features that are real-analytic in the trunk's weights satisfy it at almost every weight as soon
as they do at one, so one certified rank proves it for this architecture and these data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_conv.expressivity.alignment import certify_alignment
from lightning_conv.expressivity.certificate import RankCertificate, require_features, too_narrow
from lightning_conv.expressivity.distinct import certify_distinct
from lightning_conv.expressivity.singular import certify_held, feature_rounding
from lightning_conv.expressivity.stream import FeatureRows, HeldRows
from lightning_conv.expressivity.streamed import certify_streamed
from lightning_conv.progress import Report

Method: TypeAlias = Literal["auto", "singular", "distinct", "alignment"]

HELD_UP_TO = 2048
"""Samples or features to which all singular values are computed: beyond, two Cholesky factorisations are ten times faster."""


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
    max_memory: int | None = None,
    folder: str | Path | None = None,
    progress: bool | Report | None = None,
) -> RankCertificate:
    """Certify that the last hidden features h of the whole training set let the last layer reach every target.

    - ``"singular"``: rank [h, 1] = n at the present weights: from all singular values (``certify_held``), or for many samples
      from verified Cholesky factors of the Gram matrix, strip by strip (``certify_streamed``).
    - ``"distinct"``: rank n at almost every weight of a wide last hidden layer, because what enters it is distinct
      (``certify_distinct``).
    - ``"alignment"``: for heads narrower than n, the weaker condition that depends on the targets (``certify_alignment``).
    - ``"auto"``: alignment where the head is too narrow and there are targets, otherwise singular.

    Args:
        features: h, (n, m_H), one row a training sample, the inputs of the last linear layer: float64, or float32 with
            ``recompute``; or ``FeatureRows``, which are computed strip by strip and never held.
        method: see above.
        bias: whether the last layer has a trainable bias; without one the matrix is h alone.
        recompute: gives the same features from a float64 copy of the trunk; called when ``features`` are not float64,
            because a float32 rank says nothing (rounding fills every direction to about 1e-7 of the largest).
        feature_error: Frobenius norm of what rounding inside the trunk may have changed in float64 features (for ``"distinct"``
            in ``entering``). With ``recompute`` it is estimated as 16 * 2^-29 |h_32 - h_64|_F, the measured float32
            error scaled by the ratio of the unit roundoffs, with a safety factor of 16. Zero: the certificate is about the matrix
            as given.
        same_inputs: tells whether samples i and j are the same input; asked for the two closest rows when rank n is not
            certified, because equal features that went through rounding prove nothing, while equal inputs do.
        entering: for ``"distinct"``: what enters the last hidden layer, (n, d), float64.
        targets: for ``"alignment"``: Y, (n, C); class numbers count as one-hot rows.
        max_memory: for many samples: bytes that may be used (default a quarter of what is free).
        folder: for many samples: where a computation is kept that goes on after a kill.
        progress: show a bar on standard error; None: on a terminal, where it takes long. A function is told the share that is
            done, 0 to 1, instead, to write it to a log.

    Returns:
        ``certified``: rank n is proven (up to ``feature_error``). ``refuted``: it cannot be n: too narrow, or two equal
        samples, named. ``undecided``: sigma_min is not above its rounding bound; the two closest rows are named.

    Raises:
        ValueError: empty, not a matrix, NaN or infinity, an unknown method, or a method without what it needs.
        TypeError: float32 features without ``recompute``.
        MemoryError: ``max_memory`` cannot be kept.

    Example:
        >>> import torch
        >>> certificate = certify_expressivity(torch.eye(4, 3, dtype=torch.float64))  # 3 features and the bias column
        >>> certificate.verdict, certificate.rank_lower
        ('certified', 4)
    """
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is not one of {', '.join(get_args(Method))}")
    if isinstance(features, Tensor):
        features, feature_error = _in_float64(features, recompute, feature_error)
    samples, width = features.shape if isinstance(features, Tensor) else (features.samples, features.width)
    if method == "auto":
        narrow = too_narrow(samples, width, bias=bias) is not None
        method = "alignment" if narrow and targets is not None else "singular"
    if method == "distinct":
        if entering is None:
            raise ValueError(
                'entering: None; method="distinct" needs what enters the last hidden layer, (n, d) in float64'
            )
        return certify_distinct(entering, width, bias=bias, feature_error=feature_error, progress=progress)
    if method == "alignment":
        if targets is None:
            raise ValueError(
                'targets: None; method="alignment" is about the targets of the samples, (n, C) or class numbers'
            )
        held = features if isinstance(features, Tensor) else features.rows(0, samples)
        return certify_alignment(held, targets, bias=bias, feature_error=feature_error)
    if isinstance(features, Tensor) and is_held(samples, width, bias=bias):
        return certify_held(features, bias=bias, feature_error=feature_error, same_inputs=same_inputs)
    rows = HeldRows(features) if isinstance(features, Tensor) else features
    return certify_streamed(
        rows, bias=bias, feature_error=feature_error, max_memory=max_memory, folder=folder, progress=progress
    )


def is_held(samples: int, width: int, *, bias: bool) -> bool:
    """Whether ``"singular"`` computes all singular values, of features that are held: also of narrow ones, for their rank."""
    return min(samples, width) <= HELD_UP_TO or too_narrow(samples, width, bias=bias) is not None


def _in_float64(features: Tensor, recompute: Callable[[], Tensor] | None, feature_error: float) -> tuple[Tensor, float]:
    require_features(features)
    if features.dtype == torch.float64:
        return features, feature_error
    if recompute is None:
        raise TypeError(
            f"features: {features.dtype}; a rank needs float64 features from a float64 copy of the trunk: pass recompute=, or use "
            "last_hidden_features(..., dtype=torch.float64)"
        )
    exact = recompute()
    require_features(exact)
    if exact.dtype != torch.float64 or exact.shape != features.shape:
        raise TypeError(
            f"recompute: returned {exact.dtype} of shape {tuple(exact.shape)}; need float64 of {tuple(features.shape)}"
        )
    return exact, feature_rounding(features, exact)
