"""``GalleryCase``: one kind of run, and what has to be said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
from torch import Tensor

from lightning_conv.health.finding import Level
from lightning_conv.recipes.lab.health.networks import GalleryModule


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run of a case.

    Attributes:
        module: With its network, loss and optimizer.
        inputs: Of the training set.
        targets: Of the training set.
        batch: Samples of a step; None: all of them.
        epochs: Passes over the training set.
        probe: Samples of the probe.
        callbacks: Beside ``ConvergenceHealth``.
    """

    module: GalleryModule
    inputs: Tensor
    targets: Tensor
    batch: int | None = None
    epochs: int = 60
    probe: int = 64
    callbacks: tuple[pl.Callback, ...] = ()


@dataclass(frozen=True)
class Said:
    """What has to be said.

    Attributes:
        name: Name of the finding.
        level: Its level at least.
        words: What its sentence has to contain.
    """

    name: str
    level: Level
    words: str


@dataclass(frozen=True)
class GalleryCase:
    """One kind of run.

    Attributes:
        name: In small letters with ``_``.
        what: The illness, or what the healthy run is, in words.
        make: The run of a seed; called after the seed is set.
        said: What has to be said, any one of them; empty: the run is healthy, and nothing above ``notice`` may be said.
    """

    name: str
    what: str
    make: Callable[[int], Setup]
    said: tuple[Said, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong with the run."""
        return not self.said
