"""``Watch``: what the monitors measured in a run, with a copy of the module at that moment. All access to their insides is here."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.run import beginning


@dataclass(frozen=True)
class Measured:
    """One kernel of a run."""

    step: int
    optimizer: str  # whose network it is; empty where the run has one
    outputs: str  # "trace", or what the run's budget chose
    matrix: Tensor
    batch: Any  # as the training step would get it
    module: pl.LightningModule  # a copy, at the same weights


@dataclass(frozen=True)
class Latest:
    """The latest kernel of a measurement that monitors share."""

    step: int
    optimizer: str
    outputs: str
    matrix: Tensor
    network: Any  # that was measured


def kernels_of(trainer: pl.Trainer) -> list[Latest]:
    """Return the latest kernel of each measurement."""
    monitors = {id(each._kernel): each for each in monitors_of(trainer, KernelMonitor) if each._kernel}
    found = [(each, each._kernel) for each in monitors.values() if each._kernel._measured is not None]
    return [
        Latest(kernel._measured[0], each.optimizer, *_facts(kernel._measured[1]), kernel.run_network)
        for each, kernel in found
    ]


def _facts(gram: Any) -> tuple[str, Tensor]:
    return gram.outputs, gram.matrix


@contextmanager
def batches_of_the_probe() -> Iterator[list[tuple[Any, Any]]]:
    """Collect the networks that are measured with the batches that their samples come in, as the training step would get them."""
    batches, original = [], beginning.network_of

    def network_of(trainer: pl.Trainer, probe: Any, parameters: Any, batch: Any, samples: Any, **options: Any) -> Any:
        found = original(trainer, probe, parameters, batch, samples, **options)
        batches.append((found, batch))
        return found

    beginning.network_of = network_of
    try:
        yield batches
    finally:
        beginning.network_of = original


class Watch(pl.Callback):
    """Keeps the first and the last kernel of a run. Place it behind the monitors."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.kept = batches, []
        self.first: list[Measured] = []  # of each network
        self.last: list[Tensor] = []  # the kernels of the last look
        self.trained = False  # whether the run has come to its first step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.trained = True
        self._keep(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep(trainer, pl_module)

    def _keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        found = [each for each in kernels_of(trainer) if each.step == trainer.global_step]
        new = [each for each in found if not any(each.matrix is matrix for matrix in self.last)]
        if not new:
            return
        self.last = [each.matrix for each in found]
        copied = copy.deepcopy(module, _without_graphs(module))
        made = [
            Measured(
                each.step,
                each.optimizer,
                each.outputs,
                each.matrix,
                copy.deepcopy(self._batch_of(each.network)),
                copied,
            )
            for each in new
        ]
        seen = {each.optimizer for each in self.kept}
        self.first += [each for each in made if each.optimizer not in seen]
        self.kept = self.first + made

    def _batch_of(self, network: Any) -> Any:
        # In a run that a budget limits, fewer samples than these are measured.
        return next(batch for measured, batch in self.batches if measured.inputs is network.inputs)


def _without_graphs(module: pl.LightningModule) -> dict[int, Any]:
    """Return copies of the attributes that ``copy.deepcopy`` refuses: tensors with a graph, such as a state that is carried on."""
    leaves = [leaf for each in module.modules() for leaf in tree_leaves(vars(each))]
    return {id(leaf): leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_leaf}
