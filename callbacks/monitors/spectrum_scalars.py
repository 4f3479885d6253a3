"""``spectrum_scalars``, ``counted_eigenvalues``: what of the spectrum of a measured kernel is logged as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_conv.callbacks.monitors.spectral_decay import decay_quantities
from lightning_conv.callbacks.run.measured_kernel import is_of_loss, tags_of
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.layers import lambda_min_from_layers
from lightning_conv.kernels.products.precision import PRECISIONS
from lightning_conv.linalg.spectrum import Spectrum


def spectrum_scalars(gram: KernelGram, spectrum: Spectrum, layers: Mapping[str, Spectrum]) -> dict[str, float]:
    """Return the scalars of a kernel by tag, which ``LambdaMin`` lists.

    The lower end of lambda_min is raised to the sum of those of the layers where that is larger, and not above the upper end.

    Args:
        gram: the kernel.
        spectrum: its eigenvalues.
        layers: the spectra of the layers' kernels; empty: they are not known.
    """
    lower = max(spectrum.lambda_min.lower, min(lambda_min_from_layers(layers), spectrum.lambda_min.upper))
    value = max(spectrum.lambda_min.value, lower)
    tags, of_loss = tags_of(gram), is_of_loss(gram)
    scalars = {} if of_loss else {"convergence/lambda_min": value}
    scalars |= {
        f"{tags}/lambda_min": value,
        f"{tags}/lambda_min_lower": lower,
        f"{tags}/lambda_min_upper": spectrum.lambda_min.upper,
        f"{tags}/lambda_max": spectrum.lambda_max.value,
        f"{tags}/condition_number": spectrum.condition_number,
        f"{tags}/trace": gram.trace,
        f"{tags}/effective_rank": spectrum.effective_rank,
        f"{tags}/floor": gram.floor,
        f"{tags}/precision": float(PRECISIONS.index(gram.precision)),
    }
    if gram.outputs == "projected":
        scalars[f"{tags}/projection_error"] = gram.projection_error
    if of_loss:  # 1^T M 1 is the squared norm of the gradient of the probe's loss
        scalars[f"{tags}/gradient_norm"] = math.sqrt(max(float(gram.matrix.sum()), 0.0))
    else:
        scalars |= {f"{tags}/{name}": value for name, value in decay_quantities(spectrum, gram.n_samples).items()}
    if layers:
        scalars[f"{tags}/lambda_min_layers"] = max(each.lambda_min.value for each in layers.values())
    return scalars


def counted_eigenvalues(spectrum: Spectrum, tag: str) -> Tensor:
    """Return the logarithms to the base of 10 of all eigenvalues, with those that do not stand clear of their error at the error.

    So a histogram counts all of them, zeros included, and has those of which only the error is known in its first bar.

    Args:
        spectrum: the eigenvalues.
        tag: of the histogram, for the message where only the outermost ones are known.

    Returns:
        (N,), ascending; empty where neither an eigenvalue nor the error has a logarithm.
    """
    values, floor = spectrum.all_eigenvalues(tag), spectrum.floor
    clear = values[values > floor]
    if not (math.isfinite(floor) and floor > 0):
        if not len(clear):
            return clear
        floor = float(clear.min())
    return values.clamp(min=floor).log10()
