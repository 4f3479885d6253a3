"""``StudyRun``: one run of the study of steps: its network, data, loss, optimizer, rate and what is done to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from lightning_conv.health.findings.of_step import SAFE, SAFE_MOMENTUM
from lightning_conv.recipes.lab.health.networks import CLASSES, SmallGPT, additions, digits, mlp, one_hot, resnet

Network: TypeAlias = Literal["mlp", "cnn", "resnet8", "gpt"]
LossName: TypeAlias = Literal["mse", "cross-entropy"]
OptimizerName: TypeAlias = Literal["sgd", "momentum", "adamw"]
Cause: TypeAlias = Literal["none", "rate raised", "bad batch", "wrong labels", "NaN in the data", "overflow"]

MOMENTUM = 0.9

RAISED = 20.0
"""Ratio at the start that a rate which is raised in the middle would have had."""


@dataclass(frozen=True)
class Size:
    """How large the runs of one network are.

    Attributes:
        samples: Of the training set.
        batch: Of a mini-batch.
        probe: Samples of the probe where the run has mini-batches.
        steps: Optimizer steps.
        every: Steps between two measurements.
    """

    samples: int
    batch: int
    probe: int
    steps: int
    every: int


SIZES: dict[Network, Size] = {
    "mlp": Size(128, 32, 64, 120, 10),
    "cnn": Size(128, 32, 32, 100, 10),
    "resnet8": Size(96, 32, 24, 60, 10),
    "gpt": Size(64, 16, 16, 80, 10),
}


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run.

    Attributes:
        network: Its name.
        loss: Its name; the GPT has cross-entropy only.
        optimizer: Its name.
        full_batch: Whether every step sees all samples.
        ratio: Stability ratio at the start, from which the rate is set.
        seed: Of the samples, the weights and their order.
        cause: What is done to it from the middle on.
    """

    network: Network
    loss: LossName
    optimizer: OptimizerName
    full_batch: bool
    ratio: float
    seed: int
    cause: Cause = "none"

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return "/".join(str(each) for each in asdict(self).values())

    @property
    def size(self) -> Size:
        """How large it is."""
        return SIZES[self.network]

    @property
    def at(self) -> int:
        """Step before which something is done to it: between two measurements."""
        return self.size.steps // 2 + self.size.every // 2

    @property
    def safe(self) -> float:
        """Ratio that an advised rate is to have."""
        return SAFE if self.optimizer == "sgd" else SAFE_MOMENTUM

    def rate_at(self, step: int, rate: float) -> float:
        """Return the learning rate after so many steps.

        Args:
            step: Optimizer steps done.
            rate: The rate at the start.
        """
        return rate * RAISED / self.ratio if self.cause == "rate raised" and step > self.at else rate


@dataclass(frozen=True)
class Task:
    """What a run is trained on.

    Attributes:
        net: The network at its start.
        inputs: The samples.
        targets: Their targets.
        loss: Function of (outputs, targets).
        squared: Whether it is the mean squared error.
    """

    net: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    squared: bool

    @classmethod
    def of(cls, run: StudyRun) -> Task:
        """Build the network and draw the samples; the global seed is set."""
        torch.manual_seed(run.seed)
        if run.network == "gpt":
            tokens, following = additions(run.size.samples, run.seed)
            return cls(SmallGPT(), tokens, following, _token_loss, False)
        x, labels = digits(run.size.samples, run.seed)
        activation = nn.ReLU if run.seed % 2 else nn.Tanh
        net = {"mlp": lambda: mlp(64, 64, activation=activation), "cnn": cnn, "resnet8": resnet}[run.network]()
        if run.loss == "mse":
            return cls(net, x, one_hot(labels), F.mse_loss, True)
        return cls(net, x, labels, F.cross_entropy, False)


def optimizer_of(run: StudyRun, net: nn.Module, rate: float) -> Optimizer:
    """Build the optimizer of a run; AdamW has torch's own settings.

    Args:
        run: The run.
        net: Its network.
        rate: The learning rate.
    """
    if run.optimizer == "adamw":
        return AdamW(net.parameters(), lr=rate)
    return SGD(net.parameters(), lr=rate, momentum=MOMENTUM if run.optimizer == "momentum" else 0.0)


def cnn() -> nn.Module:
    """Build a convolutional network with BatchNorm for images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )


def _token_loss(logits: Tensor, of: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), of.flatten())
