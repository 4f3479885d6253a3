"""``resolved_spectrum``: a kernel in the lowest precision in which lambda_min stands clear of its rounding errors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_conv.kernels.gram import KernelGram, Outputs, ntk_gram
from lightning_conv.kernels.products.precision import PRECISIONS, Precision
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.spectrum import Method, Spectrum
from lightning_conv.networks.evaluation import BatchNormMode, Inputs


def resolved_spectrum(
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: Outputs = "trace",
    cotangents: Tensor | None = None,
    parameters: Sequence[str] | str | None = None,
    per_layer: bool = False,
    start: Precision = "fast",
    precision: Precision | None = None,
    batch_norm: BatchNormMode = "eval",
    max_memory: float | None = None,
    method: Method = "dense",
    projections: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[KernelGram, Spectrum]:
    """Compute a kernel and its spectrum, in higher and higher precision until lambda_min is well above its error.

    The precisions are ``"fast"``, ``"exact"`` and ``"certified"``, in this order. The first one with
    ``lambda_min.resolved`` (an error of at most a tenth of the value to either side) is returned. If float64 does not
    resolve lambda_min either, the last result is returned, with a lower bound of 0.

    Args:
        model: see ``ntk_gram``.
        inputs: see ``ntk_gram``.
        outputs: see ``ntk_gram``.
        cotangents: see ``ntk_gram``.
        parameters: see ``ntk_gram``.
        per_layer: see ``ntk_gram``.
        start: precision to begin with, such as the one that was needed a few steps ago.
        precision: the only precision to use, whether it resolves lambda_min or not; None: as described above.
        batch_norm: see ``ntk_gram``.
        max_memory: see ``ntk_gram``.
        method: see ``kernel_spectrum``.
        projections: see ``ntk_gram``.
        seed: see ``ntk_gram``.
        progress: see ``ntk_gram``.

    Returns:
        The last Gram matrix, whose ``precision`` tells which one was needed, and its spectrum.
    """
    allowed = PRECISIONS[PRECISIONS.index(start) :] if precision is None else (precision,)
    for each in allowed:
        gram = ntk_gram(
            model,
            inputs,
            outputs=outputs,
            cotangents=cotangents,
            parameters=parameters,
            per_layer=per_layer,
            precision=each,
            batch_norm=batch_norm,
            max_memory=max_memory,
            projections=projections,
            seed=seed,
            progress=progress,
        )
        spectrum = kernel_spectrum(gram, method=method)
        if spectrum.lambda_min.resolved:
            break
    return gram, spectrum
