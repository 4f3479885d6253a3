"""``MeasuredSamples``: the samples of a probe that are measured, and which ones of the run they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.callbacks.run.network import RunNetwork
from lightning_conv.networks.inputs import input_tensors, sample_count, spread


class MeasuredSamples:
    """The samples on which the network of a run is measured; they may be fewer than were read.

    Args:
        network: what is measured, on which samples.

    Attributes:
        run_network: what is measured, on the samples that were read.
        probe: the settings.
        inputs: the samples, m of them.
        targets: their targets; None: not known.
    """

    def __init__(self, network: RunNetwork) -> None:
        self.run_network, self.probe = network, network.probe
        self.inputs, self.targets = network.inputs, network.targets

    @property
    def samples(self) -> int:
        """Return the number m of samples."""
        return sample_count(self.inputs)

    @property
    def rows(self) -> Tensor:
        """Return the numbers of the measured samples among those that were read, (m,)."""
        own = self.run_network.loss.own
        chosen = spread(torch.arange(self.samples if own is None else own.samples), self.samples)
        assert isinstance(chosen, Tensor)
        return chosen

    @property
    def numbers(self) -> list[int] | None:
        """Return the number of each measured sample in the training set, (m,); None: not known."""
        read = self.run_network.numbers
        if read is None or len(read) != sample_count(self.run_network.inputs):
            return None
        chosen = spread(torch.tensor(read), self.samples)
        assert isinstance(chosen, Tensor)
        return list(map(int, chosen))

    def has_samples_of(self, other: MeasuredSamples) -> bool:
        """Return whether the samples of another probe are the same, number for number.

        Args:
            other: the other one.
        """
        some, others = input_tensors(self.inputs), input_tensors(other.inputs)
        return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
