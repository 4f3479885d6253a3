"""What the theorems ask of a run's data: all of them in every step, the same at every reading, and all of them on the probe."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_conv.callbacks.run.assumptions import Breach
from lightning_conv.callbacks.run.batch import InputFn, take_inputs, take_targets, transfer
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.sampling import describe_sampling, training_samples
from lightning_conv.networks.evaluation import Inputs, input_tensors, sample_count


def data_breaches(trainer: pl.Trainer, inputs: Inputs, targets: Tensor | None, probe: Probe) -> list[Breach]:
    """Breaches of "full batch", "whole set" and "fixed data".

    Args:
        trainer: of the run.
        inputs: of the probe.
        targets: of the probe, or None.
        probe: its settings.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None or not hasattr(loader.dataset, "__len__"):
        why = f"the training data ({type(loader).__name__}) have no random access, so that a step on all of them cannot be told"
        return [Breach("full batch", why), Breach("whole set", why)]
    samples, _ = training_samples(trainer, hint="")
    found = []
    if why := describe_sampling(trainer).not_whole:
        found.append(Breach("full batch", why))
    if why := _not_all(trainer, samples, loader, inputs, targets, probe):
        found.append(Breach("whole set", why))
    try:
        alike = _read_alike(trainer, samples, loader, probe.input_fn)
    except Exception as error:
        return [*found, Breach("fixed data", f"whether inputs are fixed could not be found out ({error})")]
    if not alike:
        found.append(
            Breach("fixed data", "augmentation: an input differs when it is read again, so every step has another loss")
        )
    return found


def _not_all(
    trainer: pl.Trainer, samples: Any, loader: DataLoader[Any], inputs: Inputs, targets: Tensor | None, probe: Probe
) -> str:
    """Why the probe's loss is not the training loss; empty if it is."""
    held, size = sample_count(inputs), len(samples)
    if held != size:
        return f"the probe has {held} of the {size} training samples, so its loss is not the training loss"
    if probe.inputs is None:
        return ""
    try:
        with isolate_rng():
            batch = transfer(trainer, loader.collate_fn([samples[i] for i in range(size)]))
        read = take_inputs(batch, probe.input_fn), take_targets(batch, probe.target_fn)
        same = torch.equal(*(_sorted_rows(x, y) for x, y in ((inputs, targets), read)))
    except Exception as error:
        return f"whether the samples given to the probe are the training set could not be found out ({error})"
    return "" if same else "the samples given to the probe are not those of the training set"


def _sorted_rows(inputs: Inputs, targets: Tensor | None) -> Tensor:
    """Every sample with its target as one row of numbers, in an order of their own."""
    parts = [*input_tensors(inputs), *([] if targets is None else [targets])]
    rows = torch.cat([part.detach().cpu().double().reshape(len(part), -1) for part in parts], 1)
    ordered, counts = torch.unique(rows, dim=0, return_counts=True)
    every: Tensor = ordered.repeat_interleave(counts, 0)
    return every


def _read_alike(trainer: pl.Trainer, samples: Any, loader: DataLoader[Any], input_fn: InputFn | None) -> bool:
    """Whether the first samples enter the network as the same numbers with other random numbers.

    A few samples, as an augmentation may leave one alone by chance.
    """
    read: list[Sequence[Tensor]] = []
    for seed in (1, 2):
        with isolate_rng():
            # Not seed_everything, which would leave its seed in the environment.
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - transforms draw from the global one
            torch.manual_seed(seed)
            batch = transfer(trainer, loader.collate_fn([samples[i] for i in range(min(8, len(samples)))]))
            read.append([tensor.detach().cpu().clone() for tensor in input_tensors(take_inputs(batch, input_fn))])
    return all(torch.equal(a, b) for a, b in zip(*read, strict=True))
