"""The wide last hidden layer: insert one before the head, or recognise the existing one."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_conv.networks.analytic import softplus
from lightning_conv.networks.evaluation import Inputs, StatelessModule
from lightning_conv.networks.head import Head, shared_with
from lightning_conv.networks.watched import watched_forward

SEPARATING = (nn.Softplus, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Mish)
"""Activations that are real-analytic on the whole line and not polynomials."""


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
    """Find the linear layer and the activation that compute the head's features.

    They are found by a forward of the samples. The features must equal sigma(z) elementwise, where z is the result of a
    linear layer with a bias and sigma is softplus, tanh, sigmoid, GELU, SiLU or Mish. The layer's weights must be free:
    trained, not reparametrized and not shared with another module. (A forward that uses ``layer.weight`` without calling
    the layer is not detected.)

    Args:
        model: the network.
        head: head of the network, see ``find_head``.
        inputs: a few samples.

    Returns:
        The layer, or a string that explains why the theorem applies to none.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, args[0].detach().clone(), output.detach().clone()))

    kinds = (nn.Linear, *SEPARATING)
    module = StatelessModule(model)
    watched_forward(module, inputs, [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)])
    features = next((x for called, x, _ in calls if called is head.module), None)
    if features is None:
        return f"the head {head.name!r} was not called"
    names = {module: name for name, module in model.named_modules()}
    for sigma, z, h in calls:
        if not isinstance(sigma, SEPARATING) or not torch.equal(h, features):
            continue
        made = [m for m, _, out in calls if isinstance(m, nn.Linear) and m is not head.module and torch.equal(out, z)]
        if len(made) != 1:
            return f"the input of {names[sigma]!r} is not the result of one linear layer"
        return _usable(model, names[made[0]], made[0], sigma, calls)
    kinds_said = ", ".join(kind.__name__ for kind in SEPARATING)
    return f"the features of {head.name!r} are not the result of an activation of a linear layer ({kinds_said})"


def _usable(
    model: nn.Module, name: str, layer: nn.Module, sigma: nn.Module, calls: list[tuple[nn.Module, Tensor, Tensor]]
) -> WideLayer | str:
    assert isinstance(layer, nn.Linear)
    if layer.bias is None:
        return f"{name!r} has no bias, which the theorem requires"
    if is_parametrized(layer) or sum(called is layer for called, _, _ in calls) != 1:
        return f"{name!r} is reparametrized or called several times, so its weights are not free"
    if (other := shared_with(model, layer)) is not None:
        return (
            f"{name!r} shares a parameter with {other!r}, so its weights are not free: its input may change with them"
        )
    if not (layer.weight.requires_grad and layer.bias.requires_grad):
        return f"{name!r} is frozen, so no noise is added to its weights"
    return WideLayer(name, layer, sigma)
