"""The probe: a fixed set of training samples on which kernels are measured, taken without touching the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from lightning_conv.anatomy import called_by
from lightning_conv.evaluation import BatchNormMode, Inputs, input_tensors, map_inputs

InputFn: TypeAlias = Callable[[Any], Inputs]
ForwardFn: TypeAlias = Callable[[nn.Module, Any], torch.Tensor]

INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values", "features", "data", "input_ids")


class Probe:
    """Which samples, which outputs and which BatchNorm mode a kernel monitor looks at.

    The samples are drawn once, by a generator of their own, from the training data set (not from its loader, whose
    iteration would consume global random numbers); they are stored in the checkpoint, so a resumed run measures on the
    same ones.

    Args:
        size: number of samples m; all of a smaller training set. lambda_min on them is an upper bound of the whole
            set's.
        seed: of the draw.
        outputs: ``"trace"``: kernel summed over the outputs (m x m). ``"full"``: (m C x m C). ``"sum"``: of the summed
            output, cheapest.
        batch_norm: ``"frozen"``: the probe's own batch statistics, held constant. ``"eval"``: running statistics (at
            step 0 these are still (0, 1), so a drift measured against that kernel compares two different networks).
        input_fn: takes the model's input out of a collated batch; default: ``batch[0]``, the batch itself if it is a
            tensor, or the first of the keys x, input(s), image(s), pixel_values, features, data, input_ids of a dict.
        forward_fn: ``forward_fn(module, inputs)`` gives the outputs whose kernel is meant; default: ``module(inputs)``.
        inputs: the samples themselves, for data sets without random access.
        max_memory: bytes a kernel may use (default: a quarter of what is free).

    Raises:
        MisconfigurationException: ``size`` below 2 or an unknown option.
    """

    def __init__(
        self,
        size: int = 128,
        seed: int = 0,
        outputs: Literal["trace", "full", "sum"] = "trace",
        batch_norm: Literal["frozen", "eval"] = "frozen",
        input_fn: InputFn | None = None,
        forward_fn: ForwardFn | None = None,
        inputs: Inputs | None = None,
        max_memory: int | None = None,
    ) -> None:
        if size < 2:
            raise MisconfigurationException(f"Probe: size={size}; a kernel needs at least 2 samples")
        for name, value, allowed in (
            ("outputs", outputs, ("trace", "full", "sum")),
            ("batch_norm", batch_norm, ("frozen", "eval")),
        ):
            if value not in allowed:
                raise MisconfigurationException(f"Probe: {name}={value!r} is not one of {', '.join(allowed)}")
        self.size = size
        self.seed = seed
        self.outputs = outputs
        self.batch_norm: BatchNormMode = batch_norm
        self.input_fn = input_fn
        self.forward_fn = forward_fn
        self.inputs = inputs
        self.max_memory = max_memory

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two probes the same: callbacks with equal keys share samples and kernels."""
        functions = id(self.input_fn), id(self.forward_fn), id(self.inputs)
        return self.size, self.seed, self.outputs, self.batch_norm, self.max_memory, *functions

    def network(self, pl_module: pl.LightningModule) -> nn.Module:
        """The module whose kernel is meant."""
        return called_by(pl_module, self.forward_fn)

    def collect(self, trainer: pl.Trainer) -> Inputs:
        """The probe's samples as CPU tensors.

        Raises:
            MisconfigurationException: no random access to the data, or no recognisable input in a batch.
        """
        if self.inputs is not None:
            return map_inputs(lambda tensor: tensor[: self.size].detach().cpu().clone(), self.inputs)
        samples, loader = training_samples(trainer, cure="pass Probe(inputs=...)")
        count = len(samples)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed)
        indices = torch.randperm(count, generator=generator)[: min(self.size, count)].sort().values.tolist()
        with isolate_rng():
            batch = transfer(trainer, loader.collate_fn([samples[index] for index in indices]))
        inputs = take_inputs(batch, self.input_fn)
        return map_inputs(lambda tensor: tensor.detach().cpu().clone(), inputs)


def training_samples(trainer: pl.Trainer, cure: str) -> tuple[Dataset[Any], DataLoader[Any]]:
    """The samples that the run trains on, by index, and its one training loader.

    Of a ``SubsetRandomSampler`` only its subset counts.

    Raises:
        MisconfigurationException: there are several loaders, or the data set is iterable or batches itself; ``cure`` says
            what to do.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            f"lightning_conv reads the samples of one DataLoader, but the training loader is {type(loader).__name__}; {cure}"
        )
    samples = loader.dataset
    if isinstance(samples, IterableDataset) or loader.batch_sampler is None or not hasattr(samples, "__len__"):
        raise MisconfigurationException(
            f"lightning_conv needs random access to single training samples, which {type(samples).__name__} (an iterable or "
            f"a self-batching data set) does not give; {cure}"
        )
    if isinstance(loader.sampler, SubsetRandomSampler):
        samples = Subset(samples, loader.sampler.indices)
    return samples, loader


def transfer(trainer: pl.Trainer, batch: Any) -> Any:  # a batch is anything
    """The batch as the training step gets it: on the device, after the module's and the data module's transfer hooks."""
    return trainer.strategy.batch_to_device(batch)


def take_inputs(batch: Any, input_fn: InputFn | None) -> Inputs:
    """The model's input out of a collated batch.

    Raises:
        MisconfigurationException: nothing recognisable in it; says what it holds.
    """
    if input_fn is not None:
        inputs = input_fn(batch)
    elif isinstance(batch, torch.Tensor):
        inputs = batch
    elif isinstance(batch, Mapping):
        found = [key for key in INPUT_KEYS if isinstance(batch.get(key), torch.Tensor)]
        if not found:
            raise MisconfigurationException(_no_input(f"a dict with keys {', '.join(map(repr, batch))}"))
        inputs = batch[found[0]]
    elif isinstance(batch, Sequence) and batch and isinstance(batch[0], torch.Tensor):
        inputs = batch[0]
    else:
        first = f" beginning with {type(batch[0]).__name__}" if isinstance(batch, Sequence) and batch else ""
        raise MisconfigurationException(_no_input(f"a {type(batch).__name__}{first}"))
    try:
        input_tensors(inputs)
    except TypeError as error:
        raise MisconfigurationException(f"input_fn: {error}") from error
    return inputs


def cannot_call(pl_module: pl.LightningModule, error: Exception) -> str:
    """What to say when the network does not take its inputs or does not return its outputs as a tensor."""
    return (
        f"{type(pl_module).__name__} could not be evaluated on its inputs ({type(error).__name__}: {error or 'no message'}); pass "
        "forward_fn=lambda module, inputs: ... (and input_fn, if the inputs are more than batch[0])"
    )


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """``inputs`` on the module's device."""
    moved: Inputs = move_data_to_device(inputs, device)
    return moved


def _no_input(found: str) -> str:
    return (
        f"batch: found no input in {found} (looked for a tensor, batch[0], or one of the keys {', '.join(INPUT_KEYS)}); "
        "pass input_fn=lambda batch: ..."
    )
