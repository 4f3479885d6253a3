"""Runs that are well: of none of them anything above ``notice`` may be said."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.recipes.lab.health.case import GalleryCase, Setup
from lightning_conv.recipes.lab.health.networks import (
    CLASSES,
    GalleryModule,
    SmallGPT,
    additions,
    digits,
    mlp,
    one_hot,
    resnet,
)

SAMPLES = 256


def adamw(seed: int) -> Setup:
    """Build what most people run."""
    x, labels = digits(SAMPLES, seed)
    module = GalleryModule(mlp(128, 128), F.cross_entropy, AdamW, lr=1e-3)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=15)


def momentum(seed: int) -> Setup:
    """Build SGD with momentum in mini-batches."""
    x, labels = digits(SAMPLES, seed)
    module = GalleryModule(mlp(128, 128), F.cross_entropy, SGD, lr=0.05, momentum=0.9, weight_decay=1e-4)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=15)


def random_labels(seed: int) -> Setup:
    """Build a run on labels that are drawn: it is not told from a hard task by anything but an audit of the labels."""
    x, _ = digits(SAMPLES, seed)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(seed))
    module = GalleryModule(mlp(256, 256), F.cross_entropy, Adam, lr=1e-3)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=20)


def label_noise(seed: int) -> Setup:
    """Build a run in which every tenth label is wrong."""
    x, labels = digits(SAMPLES, seed)
    wrong = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[: SAMPLES // 10]
    labels[wrong] = (labels[wrong] + 1) % CLASSES
    module = GalleryModule(mlp(128, 128), F.cross_entropy, Adam, lr=1e-3)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=15)


def fine_tuning(seed: int) -> Setup:
    """Build a run in which only the last layer is trained, on a trunk that does not require gradients."""
    x, labels = digits(SAMPLES, seed)
    net = mlp(128, 128)
    for layer in list(net.children())[:-1]:
        layer.requires_grad_(False)
    module = GalleryModule(net, F.cross_entropy, Adam, lr=1e-2)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=15)


def bn_resnet(seed: int) -> Setup:
    """Build a residual network with BatchNorm."""
    x, labels = digits(SAMPLES, seed)
    module = GalleryModule(resnet(), F.cross_entropy, SGD, lr=0.02, momentum=0.9)
    return Setup(module=module, inputs=x, targets=labels, batch=64, epochs=10, probe=24)


def small_gpt(seed: int) -> Setup:
    """Build a transformer of two blocks on sums such as 12+34=46."""
    tokens, following = additions(128, seed)

    def loss(logits: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), of.flatten())

    module = GalleryModule(SmallGPT(), loss, AdamW, lr=1e-3)
    return Setup(module=module, inputs=tokens, targets=following, batch=32, epochs=12, probe=8)


def guard(seed: int) -> Setup:
    """Build a run in two phases, of which the second trains the last layer alone."""
    x, labels = digits(96, seed)
    module = GalleryModule(mlp(64, 128, activation=nn.Tanh), F.cross_entropy, SGD, lr=0.1)
    switch = ExpressivityGuard(switch_at=0.5)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=20, callbacks=(switch,))


def descent(seed: int) -> Setup:
    """Build gradient descent with a step below half of its limit."""
    x, labels = digits(64, seed)
    module = GalleryModule(mlp(256, 256, activation=nn.Tanh), F.mse_loss, SGD, lr=0.05)
    return Setup(module=module, inputs=x, targets=one_hot(labels), epochs=80)


def edge_of_stability(seed: int) -> Setup:
    """Build gradient descent that drives itself to the edge of stability and stays there."""
    x, labels = digits(64, seed)
    module = GalleryModule(mlp(64, 64, activation=nn.Tanh), F.mse_loss, SGD, lr=1.5)
    return Setup(module=module, inputs=x, targets=one_hot(labels), epochs=200)


def dropout(seed: int) -> Setup:
    """Build a run with dropout."""
    x, labels = digits(SAMPLES, seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.3),
                        nn.Linear(128, CLASSES))  # fmt: skip
    module = GalleryModule(net, F.cross_entropy, Adam, lr=1e-3)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=15)


def small_start(seed: int) -> Setup:
    """Build a run whose last layer begins at zero."""
    x, labels = digits(SAMPLES, seed)
    net = mlp(128, 128)
    nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]
    module = GalleryModule(net, F.cross_entropy, Adam, lr=1e-3)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=15)


def raw_pixels(seed: int) -> Setup:
    """Build a run on pixels from 0 to 255 with BatchNorm before the first layer."""
    x, labels = digits(SAMPLES, seed)
    net = nn.Sequential(nn.BatchNorm1d(64), *mlp(128))
    module = GalleryModule(net, F.cross_entropy, Adam, lr=1e-3)
    return Setup(module=module, inputs=255 * x, targets=labels, batch=32, epochs=15)


def likelihood(seed: int) -> Setup:
    """Build a run whose loss, the negative logarithm of a density, goes below zero and may."""
    x, labels = digits(SAMPLES, seed)
    targets = 0.01 * torch.randn(SAMPLES, 1, generator=torch.Generator().manual_seed(seed)) + labels[:, None] / CLASSES

    def loss(u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        deviation = F.softplus(u[:, 1:2]) + 1e-2
        return (deviation.log() + 0.5 * ((u[:, :1] - y) / deviation).square() + 0.5 * math.log(2 * math.pi)).mean()

    module = GalleryModule(mlp(128), loss, Adam, lr=1e-3)
    return Setup(module=module, inputs=x, targets=targets, batch=32, epochs=20)


def warm_up(seed: int) -> Setup:
    """Build a run whose rate rises from zero and falls again."""
    x, labels = digits(SAMPLES, seed)

    class Scheduled(GalleryModule):
        def configure_optimizers(self) -> dict[str, object]:  # type: ignore[override]
            optimizer = super().configure_optimizers()
            rates = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(step / 20, max(0.0, (120 - step) / 100))
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    module = Scheduled(mlp(128, 128), F.cross_entropy, AdamW, lr=3e-3)
    return Setup(module=module, inputs=x, targets=labels, batch=32, epochs=15)


def _case(make: Callable[[int], Setup], what: str) -> GalleryCase:
    return GalleryCase(make.__name__, what, make)


HEALTHY = (
    _case(adamw, "AdamW, mini-batches"),
    _case(momentum, "momentum 0.9 and weight decay, mini-batches"),
    _case(random_labels, "random labels (only an audit names them)"),
    _case(label_noise, "every tenth label wrong (only an audit names them)"),
    _case(fine_tuning, "last layer on a frozen trunk"),
    _case(bn_resnet, "residual network with BatchNorm, momentum"),
    _case(small_gpt, "small GPT, AdamW"),
    _case(guard, "ExpressivityGuard, two phases"),
    _case(descent, "gradient descent, squared loss"),
    _case(edge_of_stability, "gradient descent at the edge of stability"),
    _case(dropout, "dropout"),
    _case(small_start, "last layer of zeros at the start"),
    _case(raw_pixels, "pixels from 0 to 255 before BatchNorm"),
    _case(likelihood, "a log-likelihood below zero"),
    _case(warm_up, "warm-up from the rate 0, and decay to 0"),
)
