"""`lightning-conv lab health_noise`: the simple noise scale of the product against the critical batch size of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lightning_conv.callbacks.health.noise_of_run import POOLED
from lightning_conv.health.gradient_noise import gradient_noise, noise_scale
from lightning_conv.recipes.lab.data import splits
from lightning_conv.recipes.lab.health.critical_batch import Hyperbola, fewest_steps, fit_hyperbola
from lightning_conv.recipes.lab.health.kept_results import KeptResults, grouped
from lightning_conv.recipes.lab.report import Check, Report

Source: TypeAlias = Literal["digits", "mnist"]

SMALL: dict[str, Any] = {"seeds": 1, "sources": ["digits"], "batches": [8, 32, 128], "most": 400}
"""Settings with which `run` takes seconds."""

TARGETS: dict[Source, tuple[float, ...]] = {"digits": (0.8, 0.2), "mnist": (0.8, 0.4)}
"""Losses to be reached: early and late."""

SAMPLES, PROBE = 1024, 128
RATES = [0.025 * 2.0**k for k in range(9)]
MEASURED = 32
"""Batch of the run in which the noise scale is measured, at the best rate of that batch."""

FEW = 3
"""Sweeps from which on the check has to be satisfied."""

WITHIN = 3.0
"""Factor within which the noise scale is to lie of the critical batch."""


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


def run(
    *,
    seeds: int = 5,
    first_seed: int = 0,
    sources: list[Source] | None = None,
    batches: list[int] | None = None,
    most: int = 3000,
    root: str = "data",
    keep: str | None = None,
) -> Report:
    """Compare the noise scale with the critical batch size on digits, and on MNIST if it is asked for.

    Cost: one to three minutes for each data set and five seeds on one core.

    Args:
        seeds: Number of seeds.
        first_seed: The first one.
        sources: ``"digits"`` (always there) and ``"mnist"`` (must be on disk); None: digits.
        batches: Batch sizes; None: 2 to 512 by factors of four.
        most: Largest number of steps of a run.
        root: Folder of MNIST.
        keep: File in which every sweep is kept, one a line; None: nothing is kept.

    Raises:
        ValueError: There is no seed, or there are fewer than three batch sizes.
    """
    sizes = tuple(batches or (2, 8, 32, 128, 512))
    if seeds < 1 or len(set(sizes)) < 3:
        raise ValueError(f"seeds, batches: {seeds}, {list(sizes)}; need 1 seed or more, and three batch sizes")
    todo = [
        NoiseCase(source, target, seed, sizes, most, root)
        for source in sources or ["digits"]
        for target in TARGETS[source]
        for seed in range(first_seed, first_seed + seeds)
    ]
    kept = KeptResults(None if keep is None else Path(keep))
    results = kept.results(
        todo, sweep, write=asdict, read=NoiseResult.from_json, title="sweeps of batch sizes", seconds=10.0
    )
    groups = grouped(results, lambda each: (each.source, each.target))
    return Report(
        name="health_noise",
        title="The noise scale against the critical batch size",
        setting=(
            f"A perceptron of 64 and 64 units on {SAMPLES} images, cross-entropy, SGD with batches drawn with replacement, seeds "
            f"{first_seed} to {first_seed + seeds - 1}. For every batch size the rate with the fewest steps to a loss of all {SAMPLES} "
            f"samples is searched among {RATES[0]:g} to {RATES[-1]:g} by factors of two. The critical batch is that of the fitted "
            "hyperbola S = S_min (1 + B_crit / B) of McCandlish et al. 2018. The noise scale is the product's: "
            f"from the gradients of {PROBE} samples in the run with batches of {MEASURED} at its best rate, pooled over "
            f"{POOLED} measurements up to the step at which the loss is reached; and of all measurements of the run together."
            + kept.words
        ),
        checks=[_check(names, some) for names, some in groups.items()],
        tables={
            "By data set and loss, medians (smallest to largest) over the seeds": [
                _row(names, some) for names, some in groups.items()
            ],
            "Steps to the loss by batch size, medians": [
                {"data": source, "loss": target}
                | {f"B = {size}": _middle([each.steps.get(size) for each in some]) for size in sizes}
                for (source, target), some in groups.items()
            ],
        },
        data={"sweeps": [asdict(each) for each in results]},
    )


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


def _check(names: tuple[str, float], results: Sequence[NoiseResult]) -> Check:
    found = [each.over_critical(each.of_run) for each in results]
    known = [each for each in found if math.isfinite(each)]
    middle = median(known) if known else math.nan
    return Check(
        f"{names[0]}, loss {names[1]:g}: the noise scale of the run is within a factor of {WITHIN:g} of the critical batch (median)",
        "McCandlish et al. 2018, section 3",
        1 / WITHIN <= middle <= WITHIN,
        f"ratio {_spread(found)}",
        must=len(known) >= FEW,
    )


def _row(names: tuple[str, float], results: Sequence[NoiseResult]) -> dict[str, Any]:
    fits = [each.fit for each in results]
    return {
        "data": names[0],
        "loss": names[1],
        "critical batch": _spread([math.nan if each is None else each.critical_batch for each in fits]),
        "error of the fit (log)": _spread([math.nan if each is None else each.error for each in fits]),
        "noise scale at the end": _spread([math.nan if each.scale is None else each.scale for each in results]),
        "over critical": _spread([each.over_critical(each.scale) for each in results]),
        "noise scale of the run": _spread([math.nan if each.of_run is None else each.of_run for each in results]),
        "of the run over critical": _spread([each.over_critical(each.of_run) for each in results]),
    }


def _spread(values: Sequence[float]) -> str:
    known = [each for each in values if math.isfinite(each)]
    if not known:
        return "not known"
    said = f"{median(known):.3g} ({min(known):.3g} to {max(known):.3g})"
    return said if len(known) == len(values) else f"{said}, {len(values) - len(known)} not known"


def _middle(values: Sequence[int | None]) -> str:
    known = [each for each in values if each is not None]
    return f"{median(known):g}" if known else "not reached"
