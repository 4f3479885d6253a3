"""Runs with a known illness."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from lightning_conv.recipes.lab.health.case import GalleryCase, Said, Setup
from lightning_conv.recipes.lab.health.networks import CLASSES, Detached, GalleryModule, Loss, digits, mlp, one_hot

SAMPLES = 64


def _squared(net: nn.Module, seed: int, *, lr: float = 0.2, loss: Loss = F.mse_loss, **settings: Any) -> Setup:
    """Return full-batch gradient descent on the squared loss."""
    x, labels = digits(SAMPLES, seed)
    return Setup(module=GalleryModule(net, loss, SGD, lr=lr), inputs=x, targets=one_hot(labels), **settings)


def _scaled(net: nn.Sequential, weight: float, bias: float | None = None, layers: slice = slice(None)) -> nn.Sequential:
    """Multiply the weights of linear layers, and set their biases."""
    for layer in [each for each in net if isinstance(each, nn.Linear)][layers]:
        with torch.no_grad():
            layer.weight.mul_(weight)
            if bias is not None:
                layer.bias.fill_(bias)
    return net


def _normal(net: nn.Sequential, scale: float) -> nn.Sequential:
    """Draw all weights from N(0, scale^2 / fan-in), with biases of 0."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=scale / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    return net


def rate_far_too_large(seed: int) -> Setup:
    """Build a run at five times the limit of its rate."""
    return _squared(mlp(128, 128), seed, lr=20.0)


def momentum_too_large(seed: int) -> Setup:
    """Build a run of momentum 0.99 at the rate of plain descent."""
    x, labels = digits(SAMPLES, seed)
    module = GalleryModule(mlp(128, 128), F.mse_loss, SGD, lr=60.0, momentum=0.99)
    return Setup(module=module, inputs=x, targets=one_hot(labels))


def duplicates(seed: int) -> Setup:
    """Build a run on samples that are there twice with different labels."""
    x, labels = digits(SAMPLES // 2, seed)
    module = GalleryModule(mlp(128), F.cross_entropy, Adam, lr=1e-2)
    return Setup(
        module=module, inputs=x.repeat(2, 1), targets=torch.cat([labels, (labels + 1) % CLASSES]), batch=16, epochs=40
    )


def too_narrow(seed: int) -> Setup:
    """Build a run with three units before ten outputs."""
    return _squared(mlp(64, 3), seed, lr=0.5, epochs=200)


def dead_layer(seed: int) -> Setup:
    """Build a run whose first layer is off for every sample."""
    return _squared(_scaled(mlp(64, 64), 1.0, -50.0, slice(1)), seed)


def saturated_units(seed: int) -> Setup:
    """Build a run whose sigmoids are at their ends for every sample."""
    x, labels = digits(SAMPLES, seed)
    net = _scaled(mlp(64, 64, activation=nn.Sigmoid), 1.0, 20.0, slice(1))
    return Setup(module=GalleryModule(net, F.cross_entropy, SGD, lr=0.1), inputs=x, targets=labels)


def exploding_start(seed: int) -> Setup:
    """Build a run of twelve layers whose signal grows threefold in each of them."""
    x, labels = digits(SAMPLES, seed)
    net = _normal(mlp(*[64] * 12), 3.0 * math.sqrt(2))
    return Setup(module=GalleryModule(net, F.cross_entropy, Adam, lr=1e-3), inputs=x, targets=labels)


def vanishing_start(seed: int) -> Setup:
    """Build a run of twenty layers in torch's own initialisation, which shrinks the signal in each of them."""
    x, labels = digits(SAMPLES, seed)
    return Setup(module=GalleryModule(mlp(*[64] * 20), F.cross_entropy, SGD, lr=0.1), inputs=x, targets=labels)


def constant_inputs(seed: int) -> Setup:
    """Build a run on inputs that are all the same."""
    x, labels = digits(SAMPLES, seed)
    module = GalleryModule(mlp(64), F.cross_entropy, Adam, lr=1e-3)
    return Setup(module=module, inputs=x[:1].repeat(SAMPLES, 1), targets=labels, batch=16, epochs=20)


def inputs_times_1000(seed: int) -> Setup:
    """Build a run on inputs that are a thousand times too large."""
    x, labels = digits(SAMPLES, seed)
    module = GalleryModule(mlp(64, 64), F.cross_entropy, Adam, lr=1e-3)
    return Setup(module=module, inputs=1000 * x, targets=labels, batch=16, epochs=20)


def frozen_group(seed: int) -> Setup:
    """Build a run whose first layers have a group with the rate 0."""
    x, labels = digits(SAMPLES, seed)

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        first, second, head = (each for each in net.children() if isinstance(each, nn.Linear))
        return [
            {"params": [*first.parameters(), *second.parameters()], "lr": 0.0},
            {"params": list(head.parameters())},
        ]

    module = GalleryModule(mlp(64, 64), F.cross_entropy, Adam, groups=groups, lr=1e-3)
    return Setup(module=module, inputs=x, targets=labels, batch=16, epochs=20)


def left_out_of_the_optimizer(seed: int) -> Setup:
    """Build a run whose optimizer has only the last layer."""
    x, labels = digits(SAMPLES, seed)
    net = mlp(64, 64)
    module = GalleryModule(net, F.cross_entropy, SGD, groups=lambda of: list(of.children())[-1].parameters(), lr=0.1)
    return Setup(module=module, inputs=x, targets=labels, batch=16, epochs=20)


def nan_in_data(seed: int) -> Setup:
    """Build a run on data with one pixel that is NaN."""
    setup = _squared(mlp(64), seed, batch=16, epochs=5)
    setup.inputs[seed + 7, 3] = math.nan
    return setup


def wrong_sign(seed: int) -> Setup:
    """Build a run that maximises its loss."""
    x, labels = digits(SAMPLES, seed)
    module = GalleryModule(mlp(64), lambda u, y: -F.cross_entropy(u, y), Adam, lr=1e-2)
    return Setup(module=module, inputs=x, targets=labels, batch=16, epochs=20)


def infinite_at_zero(seed: int) -> Setup:
    """Build a run with the logarithm of a share that becomes 0."""
    x, labels = digits(SAMPLES, seed)

    def loss(u: Tensor, y: Tensor) -> Tensor:
        shares = torch.relu(u) / (torch.relu(u).sum(1, keepdim=True) + 1e-6)
        return -shares.gather(1, y[:, None]).log().mean()

    return Setup(module=GalleryModule(mlp(64), loss, SGD, lr=0.1), inputs=x, targets=labels, batch=16, epochs=5)


def cut_from_the_graph(seed: int) -> Setup:
    """Build a run whose first layer is behind a ``detach``."""
    x, labels = digits(SAMPLES, seed)
    return Setup(
        module=GalleryModule(Detached(64), F.cross_entropy, Adam, lr=1e-3),
        inputs=x,
        targets=labels,
        batch=16,
        epochs=20,
    )


def _case(make: Callable[[int], Setup], what: str, *said: Said) -> GalleryCase:
    return GalleryCase(make.__name__, what, make, said)


SICK = (
    _case(rate_far_too_large, "SGD, rate five times its limit", Said("stability", "alert", "too long for the curvature")),
    _case(momentum_too_large, "momentum 0.99, rate far above its limit", Said("stability", "alert", "too long for the curvature")),
    _case(duplicates, "32 samples twice, with different labels", Said("loss_floor", "warning", "32 such pairs")),
    _case(too_narrow, "3 units before 10 outputs", Said("width", "warning", "3 features")),
    _case(dead_layer, "biases of -50 in the first layer", Said("units", "warning", "dead")),
    _case(saturated_units, "sigmoids at their end", Said("units", "warning", "saturated")),
    _case(exploding_start, "12 layers, each makes the signal three times larger", Said("signal", "warning", "grows")),
    _case(vanishing_start, "20 layers in torch's initialisation", Said("signal", "warning", "shrinks")),
    _case(constant_inputs, "all inputs are the same", Said("inputs", "alert", "equal")),
    _case(inputs_times_1000, "inputs times 1000", Said("inputs", "warning", "scale")),
    _case(frozen_group, "an optimizer group with the rate 0", Said("movement", "warning", "rate 0")),
    _case(left_out_of_the_optimizer, "layers that no optimizer has", Said("movement", "notice", "no optimizer")),
    _case(nan_in_data, "one pixel is NaN", Said("not_finite", "alert", "the input became NaN")),
    _case(wrong_sign, "the loss has the wrong sign", Said("descent", "warning", "curves downward")),
    _case(infinite_at_zero, "the logarithm of a share that becomes 0", Said("not_finite", "alert", "the loss became infinite")),
    _case(cut_from_the_graph, "a layer behind a detach", Said("layers", "warning", "first"), Said("movement", "warning", "first")),
)  # fmt: skip
