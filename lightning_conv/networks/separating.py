"""The activations of ``method="distinct"``: real-analytic on the whole line and no polynomials, by exact type and by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.networks.analytic_layers import altered
from lightning_conv.networks.operators import same_from, turns_linear
from lightning_conv.networks.undisturbed import undisturbed


def _gelu(z: Tensor, layer: Any) -> Tensor:
    if layer.approximate == "tanh":
        return z / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z * torch.erfc(-z / math.sqrt(2)) / 2


_FORMULAS: Mapping[type[nn.Module], Callable[[Tensor, Any], Tensor]] = {
    nn.Softplus: lambda z, layer: torch.logaddexp(layer.beta * z, torch.zeros_like(z)) / layer.beta,
    nn.Tanh: lambda z, _: 2 / (1 + torch.exp(-2 * z)) - 1,
    nn.Sigmoid: lambda z, _: 1 / (1 + torch.exp(-z)),
    nn.GELU: _gelu,
    nn.SiLU: lambda z, _: z / (1 + torch.exp(-z)),
    nn.Mish: lambda z, _: z * (1 - 2 / ((1 + torch.exp(z)) ** 2 + 1)),
}
"""Closed forms, other than torch's own way to compute them: tanh(ln(1 + e^z)) = 1 - 2 / ((1 + e^z)^2 + 1), and so on."""

SEPARATING: tuple[type[nn.Module], ...] = tuple(_FORMULAS)
"""Activations that are real-analytic on the whole line and not polynomials."""


def not_separating(name: str, sigma: nn.Module, z: Tensor, h: Tensor) -> str | None:
    """Say why an activation is not one of ``SEPARATING``, as a function; None: it is, as far as it was seen.

    It must be of one of these types exactly, without hooks or a replaced forward. Torch's softplus is z where beta z exceeds
    its threshold, which differs from ln(1 + exp(beta z)) / beta by up to ln(1 + exp(-threshold)) / beta. It counts where both
    round to one number in the type of the network (from 15 on in float32, from 37 on in float64), or where the threshold is
    at least 15 and no beta z seen exceeds it. The values must be those of the closed form, at the z seen and at 64 others.

    Args:
        name: dotted name of the activation, for messages.
        sigma: the activation.
        z: what entered it.
        h: what left it.
    """
    kind = type(sigma)
    if kind not in _FORMULAS:
        base = next(each for each in SEPARATING if isinstance(sigma, each))
        return f"{name!r} is a {kind.__name__}, a subclass of {base.__name__} that may compute something else"
    if why := altered(sigma):
        return f"{name!r} may compute something else than a {kind.__name__}: {why}"
    largest = math.inf
    if isinstance(sigma, nn.Softplus):
        beta, threshold = float(sigma.beta), float(sigma.threshold)
        if not beta > 0:
            return f"{name!r} is a softplus with beta = {beta:g}; need a positive one"
        if why := turns_linear(beta, threshold, same_from(z.dtype), float((beta * z.double()).max())):
            return f"{name!r} is a {why}, so it is not real-analytic; pass Softplus(beta, threshold=40)"
        largest = threshold / beta
    others = torch.linspace(-8, 8, 64, dtype=torch.float64).clamp(max=largest).to(z)
    with undisturbed(sigma), torch.no_grad():
        made = sigma(others.clone())
    for point, value in ((z, h), (others, made)):
        if not _agree(value, point, sigma):
            return f"{name!r} does not compute what a {kind.__name__} does"
    return None


def _agree(h: object, z: Tensor, sigma: nn.Module) -> bool:
    """Return whether h is the closed form at z up to 64 units of rounding of its type."""
    if not isinstance(h, Tensor) or h.shape != z.shape:
        return False
    exact = z.double()
    formula = _FORMULAS[type(sigma)](exact, sigma)
    room = 64 * torch.finfo(h.dtype).eps * (1 + exact.abs() + formula.abs())
    return bool(((h.double() - formula).abs() <= room).all())
