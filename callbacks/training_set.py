"""Walk the whole training set in order, without touching the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_conv.anatomy import Head, last_hidden_features
from lightning_conv.callbacks.probe import InputFn, take_inputs, training_loader
from lightning_conv.evaluation import Inputs, input_tensors


class TrainingSet:
    """The data set of the run's training loader, batch by batch in its own order, on the module's device.

    Args:
        trainer: of the run.
        pl_module: of the run.
        input_fn: see ``Probe``.

    Raises:
        MisconfigurationException: the data have no random access.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        input_fn: InputFn | None = None,
    ) -> None:
        loader = training_loader(
            trainer, cure="ExpressivityGuard verifies a fixed training set and needs a map-style data set"
        )
        self._device = pl_module.device
        self._input_fn = input_fn
        self._loader = DataLoader(
            loader.dataset, batch_size=loader.batch_size or 256, shuffle=False, collate_fn=loader.collate_fn
        )
        self.size = len(loader.dataset)  # type: ignore[arg-type]

    def batches(self) -> Iterator[tuple[Inputs, Any]]:
        """(inputs, whole batch), in the data set's order. Global random numbers are put back between batches."""
        with isolate_rng():
            iterator = iter(self._loader)
        while True:
            with isolate_rng():
                batch = next(iterator, None)
            if batch is None:
                return
            batch = move_data_to_device(batch, self._device)
            yield take_inputs(batch, self._input_fn), batch

    def first_inputs(self) -> Inputs:
        """The inputs of the first batch."""
        return next(self.batches())[0]

    def features(self, network: nn.Module, head: Head, dtype: torch.dtype | None = None) -> Tensor:
        """h of all samples, (n, m_H), computed in ``dtype`` (from a copy of the trunk in that type)."""
        parts = [last_hidden_features(network, head, inputs, dtype=dtype).cpu() for inputs, _ in self.batches()]
        return torch.cat(parts)

    def same_inputs(self, i: int, j: int) -> bool:
        """Whether samples i and j enter the network as the same tensors, each read anew."""
        with isolate_rng():
            first, second = (
                take_inputs(self._loader.collate_fn([self._loader.dataset[index]]), self._input_fn) for index in (i, j)
            )
        return all(torch.equal(a, b) for a, b in zip(input_tensors(first), input_tensors(second), strict=True))
