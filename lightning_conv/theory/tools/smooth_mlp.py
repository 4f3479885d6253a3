"""Fully connected networks with smooth activations, read as weights and bounds: ``read_mlp``, ``smooth_activation``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_conv.linalg.eigenvalues import largest_eigenvalue
from lightning_conv.linalg.rounding import gamma

OUTWARD = 2.0**-30
"""Relative margin on every stage of a bound.

The relative rounding error of a sum of k non-negative float64 terms is at most k 2^-53, so the margin covers sums and
norms of up to 2^20 terms, and a library's exp or cosh with an error of some units in the last place.
"""

SLOPE_ERROR = 2.0**-47
"""Absolute error of a computed s', if the library's tanh and logistic function err by at most 8 times 2^-52.

The error of tanh^2 is then 2^-48 and its rounding, and z enters a sigmoid whose slope times |z| is below 1/4.
"""


TINY = 2.0**-960
"""Size below which a number may have lost digits by underflow."""


def above(value: float) -> float:
    """Return a number that is certainly not smaller than the exact value of which ``value`` >= 0 is a rounding.

    Zero stays zero, since it is what frozen layers and linear activations contribute.
    """
    return math.nextafter(value * (1 + OUTWARD), math.inf) if 0 < value < TINY else value * (1 + OUTWARD)


def below(value: float) -> float:
    """Return a number that is certainly not larger than the exact value of which ``value`` >= 0 is a rounding."""
    return 0.0 if value < TINY else value * (1 - OUTWARD)


@dataclass(frozen=True)
class SmoothActivation:
    """Facts about an activation s with s' > 0 that the bounds need."""

    function: nn.Module
    slope: Callable[[Tensor], Tensor]  # s' as computed in float64, with an error of at most ``SLOPE_ERROR``
    least_slope: Callable[[float], float]  # Z -> min of s' on [-Z, Z], rounded down
    most_slope: float  # sup s'
    most_bend: float  # sup |s''|
    limit: float  # sup |s|
    at_zero: float  # s(0)
    smooth_to: float = math.inf  # torch's function is twice differentiable for |z| up to here


def _sigmoid_derivative(z: Tensor) -> Tensor:
    value = torch.sigmoid(z)
    return value * (1 - value)


def _tanh_slope(z: float) -> float:
    return below(1 / math.cosh(z) ** 2) if z < 350 else 0.0


def _sigmoid_slope(z: float) -> float:
    return below(1 / (2 + 2 * math.cosh(z))) if z < 700 else 0.0


def _softplus_slope(z: float) -> float:
    return below(1 / (1 + math.exp(z))) if z < 700 else 0.0


def smooth_activation(module: nn.Module) -> SmoothActivation | None:
    """Return the facts about tanh, the logistic sigmoid, softplus or the identity; None for any other module.

    sup |tanh''| = 4 / (3 sqrt 3), sup |sigmoid''| = 1 / (6 sqrt 3), and softplus'' is at most beta / 4. torch's
    softplus is linear above its threshold, where its slope jumps, so the bounds are valid only below it.
    """
    if type(module) is nn.Tanh:
        return SmoothActivation(
            module, lambda z: 1 - torch.tanh(z).square(), _tanh_slope, 1.0, above(4 / (3 * math.sqrt(3))), 1.0, 0.0
        )
    if type(module) is nn.Sigmoid:
        return SmoothActivation(
            module, _sigmoid_derivative, _sigmoid_slope, 0.25, above(1 / (6 * math.sqrt(3))), 1.0, 0.5
        )
    if type(module) is nn.Identity:
        return SmoothActivation(module, torch.ones_like, lambda _: 1.0, 1.0, 0.0, math.inf, 0.0)
    if isinstance(module, nn.Softplus) and type(module) is nn.Softplus and module.beta > 0:
        beta = module.beta
        return SmoothActivation(
            module,
            lambda z: torch.sigmoid(beta * z),
            lambda z: _softplus_slope(beta * z),
            1.0,
            beta / 4,
            math.inf,
            above(math.log(2) / beta),
            below(module.threshold / beta),
        )
    return None


def spectral_norm_bound(matrix: Tensor) -> float:
    """Bound |A|_2 from above by |A|_F and by the eigenvalues of the smaller of A A^T and A^T A, rounding included."""
    wide = matrix if matrix.shape[1] >= matrix.shape[0] else matrix.T
    gram = wide @ wide.T
    gram = (gram + gram.T) / 2
    slack = gamma(wide.shape[1] + 3, torch.float64) * float(gram.trace())
    top = largest_eigenvalue(gram).upper
    return min(above(math.sqrt(above(max(top, 0.0) + slack))), above(float(matrix.norm())))


@dataclass(frozen=True)
class AffineLayer:
    """z = W h + b with the norms of W that the bounds need; trained or not."""

    weight: Tensor  # (m_out, m_in), float64
    bias: Tensor  # (m_out,), zeros where there is none
    weight_trained: bool
    bias_trained: bool

    @property
    def inputs(self) -> int:
        """Number m_in of inputs."""
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """Number m_out of outputs."""
        return self.weight.shape[0]

    @cached_property
    def norm(self) -> float:
        """Upper bound of |W|_2."""
        return spectral_norm_bound(self.weight)

    @cached_property
    def row_norm(self) -> float:
        """Upper bound of the largest norm of a row."""
        return above(float(self.weight.norm(dim=1).max()))

    @cached_property
    def column_norm(self) -> float:
        """Upper bound of the largest norm of a column."""
        return above(float(self.weight.norm(dim=0).max()))


@dataclass(frozen=True)
class SmoothMLP:
    """u(x) = W_L s(W_{L-1} ... s(W_1 x + b_1) ...) + b_L with one output, L >= 2."""

    layers: tuple[AffineLayer, ...]  # L
    activations: tuple[SmoothActivation, ...]  # L - 1

    @property
    def depth(self) -> int:
        """Number L of layers."""
        return len(self.layers)

    @property
    def first(self) -> AffineLayer:
        """Layer 1."""
        return self.layers[0]

    @property
    def last(self) -> AffineLayer:
        """Layer L."""
        return self.layers[-1]


def linear_chain(model: nn.Module) -> list[nn.Module]:
    """List the modules of (nested) ``nn.Sequential`` modules in the order of their calls, without ``nn.Flatten``."""
    return [module for module in _flat(model) if type(module) is not nn.Flatten]


def read_mlp(model: nn.Module) -> SmoothMLP:
    """Read ``model``, an ``nn.Sequential`` of linear layers with one smooth activation between any two.

    Args:
        model: Linear and activation modules in alternation, beginning and ending with a linear one; an ``nn.Flatten``
            may come first. The weights are copied.

    Raises:
        ValueError: The model is not of this kind; the message names the module. Weights that are shared between layers
            or computed from other parameters (pruning, weight or spectral norm), and forward hooks are refused, because
            they make the network another function of its parameters.
    """
    chain = linear_chain(model)
    kinds = "nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity"
    if len(chain) < 3 or len(chain) % 2 == 0:
        raise ValueError(
            f"model: {len(chain)} modules in a row; need nn.Sequential(Linear, activation, Linear, ..., Linear), activations {kinds}"
        )
    _require_plain(model)
    layers, activations = [], []
    for place, module in enumerate(chain):
        if place % 2:
            activation = smooth_activation(module)
            if activation is None:
                raise ValueError(
                    f"model: {module} in place {place} has no bounds here (s' > 0, s'' bounded); use one of {kinds}"
                )
            activations.append(activation)
        elif type(module) is nn.Linear:
            layers.append(_affine(module))
        else:
            raise ValueError(f"model: {module} stands in place {place}, where a plain nn.Linear is needed")
    if layers[-1].outputs != 1:
        raise ValueError(f"model: {layers[-1].outputs} outputs; the bounds are for one")
    return SmoothMLP(tuple(layers), tuple(activations))


def _flat(model: nn.Module) -> Iterator[nn.Module]:
    if type(model) is nn.Sequential:
        for child in model:
            yield from _flat(child)
    else:
        yield model


def _require_plain(model: nn.Module) -> None:
    """Refuse weights that are computed or shared, and hooks that take part in the forward pass."""
    seen: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        for kind in ("weight", "bias") if isinstance(module, nn.Linear) else ():
            value = getattr(module, kind)
            if value is not None and module._parameters.get(kind) is not value:
                raise ValueError(
                    f"model: {kind} of {name} is no parameter but computed from others (pruning, weight_norm, ...); make it one"
                )
            if value is not None and id(value) in seen:
                raise ValueError(
                    f"model: {kind} of {name} is that of another layer, too; the bounds are for layers of their own"
                )
            seen.add(id(value))
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"model: {name or type(module).__name__} has forward hooks, which may compute anything; remove them"
            )


def _affine(module: nn.Linear) -> AffineLayer:
    weight = module.weight.detach().cpu().double()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().cpu().double()
    bias_trained = module.bias is not None and module.bias.requires_grad
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ValueError(f"model: {module} has weights that are not finite")
    return AffineLayer(weight, bias, module.weight.requires_grad, bias_trained)
