"""``planned_runs``: the runs of the study of steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from lightning_conv.recipes.lab.health.study_runs import Cause, LossName, Network, OptimizerName, StudyRun

RATIOS = (0.1, 0.3, 0.7, 1.2, 2.0, 4.0)
"""Ratios at the start, of the perceptrons."""

FEW_RATIOS = (0.3, 1.2, 4.0)
"""Of the other networks."""

CALM_RATIOS = (0.1, 0.3, 0.7)
"""Of runs to which something is done, in turn by seed."""

LOSSES: tuple[LossName, ...] = ("mse", "cross-entropy")
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "momentum", "adamw")
NETWORKS: tuple[Network, ...] = ("mlp", "cnn", "resnet8", "gpt")

SHARE = 6
"""Of so many seeds the other networks have one."""


def planned_runs(network: Network, seeds: Sequence[int]) -> list[StudyRun]:
    """Return the runs of a network: at every ratio and left alone, and with something done to them from the middle on.

    The ResNet has mini-batches only, the GPT cross-entropy only, and of tokens there is neither a bad batch nor a NaN.

    Args:
        network: Its name.
        seeds: The seeds.
    """
    return [run for seed in seeds for run in (*_left_alone(network, seed), *_disturbed(network, seed))]


def _left_alone(network: Network, seed: int) -> Iterator[StudyRun]:
    batches = (False,) if network == "resnet8" else (True, False)
    ratios = RATIOS if network == "mlp" else FEW_RATIOS
    for loss, optimizer, full, ratio in product(_losses(network), OPTIMIZERS, batches, ratios):
        yield StudyRun(network=network, loss=loss, optimizer=optimizer, full_batch=full, ratio=ratio, seed=seed)


def _disturbed(network: Network, seed: int) -> Iterator[StudyRun]:
    numbers: Cause = "overflow" if seed % 2 or network == "gpt" else "NaN in the data"
    causes: tuple[Cause, ...] = ("rate raised", "bad batch", "wrong labels", numbers)
    if network == "gpt":
        causes = ("rate raised", "wrong labels", numbers)
    losses = ("cross-entropy",) if network == "resnet8" else _losses(network)
    batches = (True, False) if network == "mlp" else (False,)
    for loss, optimizer, full in product(losses, OPTIMIZERS, batches):
        for place, cause in enumerate(causes):
            ratio = CALM_RATIOS[(seed + place) % len(CALM_RATIOS)] if network == "mlp" else 0.3
            some: dict[str, Any] = {"loss": loss, "optimizer": optimizer, "full_batch": full}
            yield StudyRun(network=network, ratio=ratio, seed=seed, cause=cause, **some)


def _losses(network: Network) -> tuple[LossName, ...]:
    return ("cross-entropy",) if network == "gpt" else LOSSES
