"""``sweep``: the fewest steps to a loss by batch size, and the noise scale in one of these runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lightning_conv.callbacks.health.noise_of_run import POOLED
from lightning_conv.health.kernel.gradient_noise import gradient_noise, noise_scale
from lightning_conv.recipes.lab.data import splits
from lightning_conv.recipes.lab.health.critical_batch import Hyperbola, fewest_steps, fit_hyperbola

Source: TypeAlias = Literal["digits", "mnist"]

SAMPLES, PROBE = 1024, 128
RATES = [0.025 * 2.0**k for k in range(9)]
MEASURED = 32
"""Batch of the run in which the noise scale is measured, at the best rate of that batch."""


@dataclass(frozen=True)
class NoiseCase:
    """A sweep.

    Attributes:
        source: Of the images.
        target: Loss to be reached.
        seed: Of samples, weights and batches.
        batches: The batch sizes.
        most: Largest number of steps.
        root: Folder of MNIST.
    """

    source: Source
    target: float
    seed: int
    batches: tuple[int, ...]
    most: int
    root: str

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.source}/{self.target:g}/{self.seed}/{self.batches}/{self.most}"


@dataclass(frozen=True)
class NoiseResult:
    """The result of a sweep.

    Attributes:
        source: Of the images.
        target: Loss to be reached.
        seed: Of samples, weights and batches.
        steps: Steps by batch size; those that did not reach the loss are left out.
        scale: The noise scale when the loss was reached, pooled over the last measurements; None: not told from the noise.
        lower: Its lower end.
        upper: Its upper end; None: there is none.
        of_run: The noise scale of all measurements of the run together; None: as above.
    """

    source: str
    target: float
    seed: int
    steps: dict[int, int]
    scale: float | None
    lower: float
    upper: float | None
    of_run: float | None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> NoiseResult:
        """Return what ``asdict`` wrote, after JSON."""
        return cls(**content | {"steps": {int(batch): number for batch, number in content["steps"].items()}})

    @property
    def fit(self) -> Hyperbola | None:
        """The hyperbola of the steps; None: too few batch sizes reached the loss."""
        return fit_hyperbola(self.steps) if len(self.steps) >= 3 else None

    def over_critical(self, scale: float | None) -> float:
        """Return a noise scale over the critical batch; NaN: one of them is not known."""
        fit = self.fit
        return math.nan if fit is None or scale is None else scale / fit.critical_batch


def sweep(case: NoiseCase) -> NoiseResult:
    """Find the fewest steps to the loss for every batch size, and measure the noise scale in one of the runs.

    Args:
        case: The sweep.

    Cost: 5 to 20 s.
    """
    x, y = _images(case)
    steps, place, measured = {}, len(RATES) // 2, None
    for size in sorted(case.batches):

        def attempt(rate: float, most: int, size: int = size) -> int | None:
            return train_to(case, x, y, size, rate, most)

        if (best := fewest_steps(attempt, RATES, first=place, most=case.most)) is not None:
            steps[size], place = best
            if measured is None or size <= MEASURED:
                measured = size, place
    if measured is None:
        return NoiseResult(case.source, case.target, case.seed, steps, None, 0.0, None, None)
    products: list[Tensor] = []
    size, place = measured
    train_to(case, x, y, size, RATES[place], case.most, products)
    noises = [gradient_noise(each) for each in products]
    scale, of_run = noise_scale(noises[-POOLED:], products[-1]), noise_scale(noises)
    numbers = scale.value, scale.upper, of_run.value
    value, upper, overall = (each if math.isfinite(each) else None for each in numbers)
    return NoiseResult(case.source, case.target, case.seed, steps, value, scale.lower, upper, overall)


def train_to(
    case: NoiseCase, x: Tensor, y: Tensor, size: int, rate: float, most: int, products: list[Tensor] | None = None
) -> int | None:
    """Return the steps of SGD after which the loss of all samples is at most the target; None: not within ``most``.

    The loss is looked at whenever the steps have grown by 3 %.

    Args:
        case: The sweep.
        x: The samples.
        y: Their labels.
        size: Of the batches.
        rate: The learning rate.
        most: Largest number of steps.
        products: Here the inner products of the gradients of the probe are added at every look; None: not wanted.
    """
    torch.manual_seed(case.seed)
    net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    weights: list[Tensor] = list(net.parameters())
    generator = torch.Generator().manual_seed(case.seed)
    following = 1
    for step in range(1, most + 1):
        rows = torch.randint(len(x), (size,), generator=generator)
        loss = F.cross_entropy(net(x[rows]), y[rows])
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, gradients, alpha=-rate)
        if step < following and step < most:
            continue
        following = max(step + 1, math.ceil(1.03 * step))
        with torch.no_grad():
            now = float(F.cross_entropy(net(x), y))
        if products is not None:
            products.append(gradient_products(net, x[:PROBE], y[:PROBE]))
        if now <= case.target:
            return step
        if not math.isfinite(now):
            return None
    return None


def gradient_products(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the inner products of the gradients of the samples' own losses, (n, n).

    Args:
        net: The network.
        x: The samples.
        y: Their labels.
    """
    weights = {name: each.detach() for name, each in net.named_parameters()}

    def of_one(given: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, given, (one[None],)), label[None])

    gradients = vmap(grad(of_one), (None, 0, 0))(weights, x, y)
    flat = torch.cat([each.flatten(1) for each in gradients.values()], 1)
    return (flat @ flat.T).double()


def _images(case: NoiseCase) -> tuple[Tensor, Tensor]:
    images, labels = _all_images(case.source, case.root)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(case.seed))[:SAMPLES]
    return images[chosen].flatten(1).float(), labels[chosen]


@cache
def _all_images(source: Source, root: str) -> tuple[Tensor, Tensor]:
    images, labels = splits(source, root, seed=0).train.tensors
    return images, labels
