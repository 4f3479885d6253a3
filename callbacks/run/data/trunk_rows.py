"""``TrunkRows``: the features of a training set, strip by strip, watched for casts to a narrower type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.data.training_set import TrainingSet
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import Head
from lightning_conv.networks.hidden_features import watched_features
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.narrowing import Narrowing, coarsest


@dataclass(frozen=True)
class TrunkRows:
    """Features of a training set, computed in strips from a copy of the trunk by all ranks together.

    A copy in float64 is watched for casts to a narrower type, in every strip and on every rank.
    """

    data: TrainingSet
    module: StatelessModule
    layer: Head
    stop: bool = False  # whether the forward pass ends at the layer, which must be called once
    _narrowings: list[Narrowing] = field(default_factory=list, compare=False)
    _cleared: set[str] = field(default_factory=set, compare=False)

    @classmethod
    def of(
        cls,
        data: TrainingSet,
        network: nn.Module,
        layer: Head,
        dtype: torch.dtype | None = None,
        *,
        stop: bool = False,
    ) -> TrunkRows:
        """Return what enters ``layer``, computed by a copy of the network whenever rows of it are asked for.

        Args:
            data: The training set.
            network: Module that takes the inputs.
            layer: A linear layer of the network.
            dtype: Type of the copy; None: that of the network.
            stop: Whether to end the forward pass there, see ``features_of``.
        """
        return cls(data, StatelessModule(network, dtype=dtype), layer, stop)

    @property
    def narrowing(self) -> Narrowing | None:
        """Where the rows that were read so far left float64, the coarsest place; None: nowhere, or the copy is not in float64."""
        return coarsest(self._narrowings)

    @property
    def narrow(self) -> str | None:
        """Return the same in words; empty: nowhere; None: the copy is not in float64 and not watched."""
        if self.module.dtype != torch.float64:
            return None
        return "" if self.narrowing is None else str(self.narrowing)

    @property
    def samples(self) -> int:
        """Number n of rows: of samples, or of tokens where the layer has several rows for each sample."""
        return self.data.size * self.layer.rows

    @property
    def width(self) -> int:
        """Width m_H of the features."""
        return self.layer.width

    def rows(self, start: int, stop: int) -> Tensor:
        """Return consecutive rows of the features h.

        Args:
            start: The first row.
            stop: The row after the last.
        """
        each, stop = self.layer.rows, min(stop, self.samples)
        first = start // each
        made = self._together(self.data.collect(lambda inputs, _: self._of(inputs), first, -(-stop // each)))
        return made[start - first * each : stop - first * each]

    def all(self) -> Tensor:
        """Return all rows of the features h, (n, m_H)."""
        return self.rows(0, self.samples)

    def at(self, chosen: Sequence[int]) -> Tensor:
        """Return the features h of the samples of these numbers.

        Args:
            chosen: Numbers of the samples.
        """
        ranks, size = self.data.ranks, self.data.sampling.batch_size

        def part() -> list[tuple[Tensor, Narrowing | None]]:
            mine = ranks.share(0, len(chosen))
            groups = [chosen[k : min(k + size, mine.stop)] for k in range(mine.start, mine.stop, size)]
            return [self._of(self.data.inputs_of(group)) for group in groups]

        return self._together([rows for parts in ranks.gather(part) for rows in parts])

    def _of(self, inputs: Inputs) -> tuple[Tensor, Narrowing | None]:
        features, narrowing = watched_features(self.module, self.layer, inputs, stop=self.stop, cleared=self._cleared)
        return features.cpu(), narrowing

    def _together(self, parts: list[tuple[Tensor, Narrowing | None]]) -> Tensor:
        for _, narrowing in parts:
            if narrowing is not None and narrowing not in self._narrowings:
                self._narrowings.append(narrowing)
        return torch.cat([features for features, _ in parts])
