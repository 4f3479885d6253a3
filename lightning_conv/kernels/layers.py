"""The kernel layer by layer: G = sum_l G_l with positive semidefinite summands (Du et al. 2019, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from lightning_conv.checked import checked
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.rounding import gamma
from lightning_conv.linalg.spectrum import Bounded, Spectrum
from lightning_conv.reporting.markdown import markdown_table


@checked()
def layer_spectra(gram: KernelGram) -> dict[str, Spectrum]:
    """Compute the spectrum of each layer's kernel, with error bounds; layers that contribute nothing are left out.

    The bounds allow for the rounding of the whole kernel: its floor is valid for each summand, and |dJ_l|_F <= |dJ|_F.

    Args:
        gram: a kernel from ``ntk_gram(..., per_layer=True)``.

    Returns:
        The spectra by layer name.

    Raises:
        ValueError: the kernel was computed without its layers.

    Cost: one eigenvalue problem per layer.

    Example:
        >>> import torch
        >>> from lightning_conv import ntk_gram
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> list(layer_spectra(ntk_gram(model, torch.eye(4), per_layer=True)))
        ['0', '2']
    """
    if not gram.layer_matrices:
        raise ValueError("gram: has no kernels of layers; compute it with ntk_gram(..., per_layer=True)")
    spectra = {}
    for layer, matrix in gram.layer_matrices.items():
        own = float(matrix.diagonal().sum())
        if own > 0:
            # kernel_spectrum takes jacobian_error relative to the matrix that it is given.
            error = gram.jacobian_error * (max(gram.trace, own) / own) ** 0.5
            alone = replace(gram, matrix=matrix, jacobian_error=error, layer_traces={}, layer_matrices={}, plan=None)
            spectra[layer] = kernel_spectrum(alone)
    return spectra


def lambda_min_from_layers(spectra: Mapping[str, Spectrum]) -> float:
    """Return a lower bound of lambda_min(G), the sum of the lower bounds of the layers.

    By Weyl's inequality lambda_min(sum_l G_l) >= sum_l lambda_min(G_l). For positive semidefinite summands this is at
    least the largest term, which is how Du et al. 2019 (section 4) use it. The bound is certified if the bounds of the
    layers are.
    """
    terms = [spectrum.lambda_min.lower for spectrum in spectra.values()]
    return sum(terms) * (1 - gamma(len(terms) + 1, torch.float64))


def trace_shares(gram: KernelGram) -> dict[str, float]:
    """Return each layer's share of the trace, which is its share of |J|_F^2.

    The shares add up to 1; for a zero kernel the result is empty.
    """
    whole = sum(gram.layer_traces.values())
    return {layer: trace / whole for layer, trace in gram.layer_traces.items()} if whole > 0 else {}


def layer_table(shares: Mapping[str, float], smallest: Mapping[str, Bounded]) -> str:
    """Return the layers as a Markdown table, with the largest lambda_min in bold if it is positive.

    Args:
        shares: shares of the trace, by layer.
        smallest: lambda_min of the layers' kernels, by layer; may be empty.
    """
    columns = ["layer", "share of the trace"] + (["lambda_min", "bounds"] if smallest else [])
    rows = []
    best = max(smallest, key=lambda layer: smallest[layer].value, default=None)
    for layer, share in shares.items():
        name = layer or "(the model)"
        cells = [f"**{name}**" if layer == best and smallest[layer].value > 0 else name, f"{share:.3e}"]
        if smallest:
            bounds = smallest.get(layer)
            numbers = (bounds.value, bounds.lower, bounds.upper) if bounds is not None else (0.0, 0.0, 0.0)
            value, lower, upper = (f"{number:.3e}" for number in numbers)
            cells += [value, f"{lower} to {upper}"]
        rows.append(cells)
    return markdown_table(columns, rows)
