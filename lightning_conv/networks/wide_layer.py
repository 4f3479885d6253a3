"""The wide last hidden layer: insert one before the head, or recognise the existing one."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_conv.checked import checked, real, whole
from lightning_conv.networks.analytic import softplus
from lightning_conv.networks.analytic_layers import altered
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import Head, shared_with
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.separating import SEPARATING, not_separating
from lightning_conv.networks.watched import watched_forward


def wide_layer_width(n_train: int, factor: float = 1.1) -> int:
    """Return the width m_H = ceil(factor * n) of a last hidden layer over n training samples.

    With the bias column the last hidden features [h, 1] are an n x (m_H + 1) matrix, and the expressivity condition
    rank [h, 1] = n needs m_H + 1 >= n. A factor below 1 must fail; a factor above 1 leaves room for a well-conditioned
    matrix.

    Args:
        n_train: number n of training samples.
        factor: width per training sample.

    Returns:
        The width, a number of units.

    Raises:
        ValueError: if `factor` is not positive.
    """
    if factor <= 0:
        raise ValueError(f"width_factor: must be positive, got {factor}")
    # Rounded first, because in binary 1.1 * 10 is slightly above 11.
    return max(1, math.ceil(round(factor * n_train, 9)))


@checked(n=whole(1), factor=real(above=0), beta=real(above=0))
def widen_head(
    model: nn.Module, n: int, factor: float = 1.1, *, beta: float = 100.0, head: str | None = None
) -> nn.Module:
    """Copy ``model`` and insert a wide layer before its head u = W h + b: u = W' softplus(V h + c) + b'.

    Kawaguchi & Sun 2021 require a last hidden layer at least n - 1 units wide with a real-analytic activation. This
    function works on any network whose last linear layer is its head, which includes every classifier of torchvision but
    SqueezeNet. SqueezeNet ends in a convolution, a ReLU and pooling, so its outputs are not linear in its last layer.

    Args:
        model: the network; it is not modified.
        n: number of training samples.
        factor: width of the new layer per training sample.
        beta: sharpness of its softplus.
        head: dotted name of the head; None: the linear layer that was created last.

    Returns:
        The copy. ``Sequential(wide, activation, head)`` replaces the head, whose name becomes ``<head>.head``.

    Raises:
        ValueError: there is no linear layer or none of that name, or the width is not positive.
    """
    if n < 1:
        raise ValueError(f"n: {n}; need the number of training samples")
    twin = copy.deepcopy(model)
    layers = [name for name, module in twin.named_modules() if type(module) is nn.Linear]
    name = head if head is not None else layers[-1] if layers else ""
    if name not in layers:
        convolutions = [name for name, module in twin.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
        hint = ""
        if convolutions and not layers:
            hint = (
                f"; if it ends in a convolution ({convolutions[-1]!r}?), as SqueezeNet does, end it in pooling, nn.Flatten() "
                "and nn.Linear(channels, classes) first"
            )
        raise ValueError(
            f"head: {head!r} is no linear layer of the model; its linear layers are {', '.join(layers) or 'none'}{hint}"
        )
    old = twin.get_submodule(name) if name else twin
    assert isinstance(old, nn.Linear)
    width = wide_layer_width(n, factor)
    like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    parts = OrderedDict(
        wide=nn.Linear(old.in_features, width, **like),
        activation=softplus(beta),
        head=nn.Linear(width, old.out_features, bias=old.bias is not None, **like),
    )
    new = nn.Sequential(parts).train(old.training)
    if not name:
        return new
    parent, _, last = name.rpartition(".")
    setattr(twin.get_submodule(parent), last, new)
    return twin


@dataclass(frozen=True)
class WideLayer:
    """Wide layer h = sigma(W x + b) whose result is the input of the head."""

    name: str
    module: nn.Linear
    activation: nn.Module


def find_wide_layer(model: nn.Module, head: Head, inputs: Inputs) -> WideLayer | str:
    """Find the linear layer and the activation that compute the head's features, as the theorem of "distinct" needs them.

    They are found by a forward of the samples. The features must equal sigma(z) elementwise, where z = W x + b is the result
    of a linear layer with a bias and sigma is softplus, tanh, sigmoid, GELU, SiLU or Mish. Both must be of these types
    exactly, without hooks or a replaced forward, and compute what their types say: their results are compared with the
    formulas in float64. What one of them gives must be the very tensor that the next one takes. Softplus must be its formula
    at every z seen (``not_separating``). The layer's weights must be free: trained, not reparametrized and not shared with
    another module. (A forward that uses ``layer.weight`` without calling the layer is not detected.)

    Args:
        model: the network.
        head: head of the network, see ``find_head``.
        inputs: samples, such as those of the first batch. What is said of the values holds for these alone.

    Returns:
        The layer, or a string that explains why the theorem applies to none.
    """
    calls: list[_Seen] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
        given = (*args, *kwargs.values())
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            places = (_Place.of(given[0]), _Place.of(output))
            calls.append(_Seen(module, given[0].detach().clone(), output.detach().clone(), *places))

    names = {module: name for name, module in model.named_modules()}
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *SEPARATING)
    seen = [module for module in names if isinstance(module, kinds)]
    stateless = StatelessModule(model)
    watched_forward(stateless, inputs, [m.register_forward_hook(record, with_kwargs=True) for m in seen])
    entering = next((call for call in calls if call.module is head.module), None)
    if entering is None:
        return f"the head {head.name!r} was not called"
    for call in calls:
        if not isinstance(call.module, SEPARATING) or not torch.equal(call.result, entering.given):
            continue
        linear = [other for other in calls if isinstance(other.module, nn.Linear) and other.module is not head.module]
        made = [other for other in linear if torch.equal(other.result, call.given)]
        if len(made) != 1:
            return f"the input of {names[call.module]!r} is not the result of one linear layer"
        for maker, taker in ((made[0], call), (call, entering)):
            if maker.left != taker.entered:
                between = f"{names[maker.module]!r} and {names[taker.module]!r}"
                return f"between {between} something else is computed, though it changes none of these samples"
        why = not_separating(names[call.module], call.module, call.given, call.result)
        return why or _usable(model, names[made[0].module], made[0], call.module, calls)
    kinds_said = ", ".join(kind.__name__ for kind in SEPARATING)
    return f"the features of {head.name!r} are not the result of an activation of a linear layer ({kinds_said})"


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, and how often it was written to: two equal ones are one tensor, with nothing done in between."""

    tensor: Tensor = field(compare=False)  # kept, so that its memory is not given to another
    address: int
    version: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        return cls(tensor, tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True)
class _Seen:
    """One call of a module."""

    module: nn.Module
    given: Tensor
    result: Tensor
    entered: _Place
    left: _Place


def _usable(model: nn.Module, name: str, made: _Seen, sigma: nn.Module, calls: list[_Seen]) -> WideLayer | str:
    layer = made.module
    assert isinstance(layer, nn.Linear)
    if layer.bias is None:
        return f"{name!r} has no bias, which the theorem requires"
    if is_parametrized(layer) or sum(call.module is layer for call in calls) != 1:
        return f"{name!r} is reparametrized or called several times, so its weights are not free"
    if type(layer) is not nn.Linear:
        return f"{name!r} is a {type(layer).__name__}, a subclass of Linear that may compute something else"
    if why := altered(layer):
        return f"{name!r} may compute something else than a Linear: {why}"
    if not _affine(layer, made):
        return f"{name!r} does not compute what a Linear does"
    if (other := shared_with(model, layer)) is not None:
        return (
            f"{name!r} shares a parameter with {other!r}, so its weights are not free: its input may change with them"
        )
    if not (layer.weight.requires_grad and layer.bias.requires_grad):
        return f"{name!r} is frozen, so no noise is added to its weights"
    return WideLayer(name, layer, sigma)


def _affine(layer: nn.Linear, made: _Seen) -> bool:
    """Return whether a layer gave x W^T + b, up to the rounding of its type: (d + 4) eps (|x| |W|^T + |b|), twice."""
    x, weight, bias = (
        tensor.detach().to(made.given.device).double() for tensor in (made.given, layer.weight, layer.bias)
    )
    room = 2 * (x.shape[-1] + 4) * torch.finfo(made.result.dtype).eps
    allowed = room * (x.abs() @ weight.abs().T + bias.abs())
    return bool(((made.result.double() - (x @ weight.T + bias)).abs() <= allowed).all())
