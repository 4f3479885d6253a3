"""Walk the whole training set in order, without touching the run: features for the certificate, loss for the gap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils.data import DataLoader

from lightning_conv.anatomy import Head, last_hidden_features
from lightning_conv.callbacks.probe import ForwardFn, InputFn, take_inputs, training_loader
from lightning_conv.evaluation import Inputs, StatelessModule, sample_count, undisturbed

LossFn: TypeAlias = Callable[[Tensor, Any], Tensor]
TargetFn: TypeAlias = Callable[[Any], Any]

TARGET_KEYS = ("y", "target", "targets", "label", "labels")


class TrainingSet:
    """The data set of the run's training loader, batch by batch in its own order, on the module's device.

    Args:
        trainer: of the run.
        pl_module: of the run.
        input_fn: see ``Probe``.
        forward_fn: see ``Probe``.
        target_fn: takes the targets out of a batch; default ``batch[1]`` or the keys y, target(s), label(s) of a dict.

    Raises:
        MisconfigurationException: the data have no random access.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        input_fn: InputFn | None = None,
        target_fn: TargetFn | None = None,
    ) -> None:
        loader = training_loader(
            trainer, cure="ExpressivityGuard verifies a fixed training set and needs a map-style data set"
        )
        self._device = pl_module.device
        self._input_fn, self._target_fn = input_fn, target_fn
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

    def mean_loss(self, network: nn.Module, loss_fn: LossFn) -> float:
        """(1/n) sum_i ell(u_i, y_i) in eval mode: the network in its own precision, the loss of its outputs in float64."""
        total, count = 0.0, 0
        reduction = getattr(loss_fn, "reduction", "mean")
        for inputs, batch in self.batches():
            with undisturbed(network), torch.no_grad():
                module = StatelessModule(network)
                outputs = module.call({}, module.convert(inputs))
                assert isinstance(outputs, Tensor)
                targets = self._targets(batch)
                if isinstance(targets, Tensor) and targets.is_floating_point():
                    targets = targets.double()
                loss = loss_fn(outputs.double(), targets)
            samples = sample_count(inputs)
            total += float(loss.mean()) * samples if reduction != "sum" else float(loss)
            count += samples
        return total / count

    def _targets(self, batch: Any) -> Any:
        if self._target_fn is not None:
            return self._target_fn(batch)
        if isinstance(batch, dict):
            found = [key for key in TARGET_KEYS if key in batch]
            if found:
                return batch[found[0]]
        elif isinstance(batch, (list, tuple)) and len(batch) > 1:
            return batch[1]
        raise MisconfigurationException(
            "batch: found no targets (looked for batch[1] or one of the keys "
            f"{', '.join(TARGET_KEYS)}), so the loss on the training set is unknown; pass target_fn=lambda batch: ..."
        )


def find_loss(pl_module: pl.LightningModule) -> nn.Module | None:
    """The one loss module that hangs on the LightningModule (``self.loss_fn = nn.CrossEntropyLoss()``), or None."""
    found = [module for module in pl_module.children() if isinstance(module, _Loss)]
    return found[0] if len(found) == 1 else None


__all__ = ["ForwardFn", "LossFn", "TargetFn", "TrainingSet", "find_loss"]
