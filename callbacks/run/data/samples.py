"""``data_violations``: does every step see all samples once, does the probe hold all of them, and are they the same at every reading?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_conv.callbacks.run.assumptions import Violation
from lightning_conv.callbacks.run.data.batch import InputFn, take_inputs, take_targets, transfer
from lightning_conv.callbacks.run.data.data_generators import unread
from lightning_conv.callbacks.run.data.sampling import training_samples
from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.callbacks.run.isolated import seed_all
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.networks.inputs import Inputs, input_tensors
from lightning_conv.networks.observed.leaves import tensors_in


def data_violations(run: RunView) -> list[Violation]:
    """Return violations of "full batch", "whole set" and "fixed data"."""
    trainer = run.trainer
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None or not hasattr(loader.dataset, "__len__"):
        why = f"the training data ({type(loader).__name__}) have no random access, so that a step on all of them cannot be told"
        return [Violation("full batch", why), Violation("whole set", why)]
    samples, _ = training_samples(trainer, hint="")
    found = []
    if why := run.sampling.not_whole:
        found.append(Violation("full batch", why))
    if why := _not_all(run, samples, loader):
        found.append(Violation("whole set", why))
    with attempted(*READING) as attempt:
        alike = _read_alike(trainer, samples, loader, run.measurement.probe.input_fn)
    if attempt.failed:
        found.append(Violation("fixed data", f"whether inputs are fixed could not be found out ({attempt.error})"))
    elif not alike:
        found.append(
            Violation(
                "fixed data", "augmentation: an input differs when it is read again, so every step has another loss"
            )
        )
    return found


def _not_all(run: RunView, samples: Any, loader: DataLoader[Any]) -> str:
    """Return why the probe's loss is not the training loss; empty if it is."""
    size, probe = len(samples), run.measurement.probe
    if run.samples != size:
        return f"the probe has {run.samples} of the {size} training samples, so its loss is not the training loss"
    if probe.inputs is None:
        return ""
    with attempted(*READING) as attempt:
        with unread(samples, loader.collate_fn):
            batch = transfer(run.trainer, loader.collate_fn([samples[i] for i in range(size)]))
        read = take_inputs(batch, probe.input_fn), take_targets(batch, probe.target_fn)
        same = torch.equal(*(_sorted_rows(x, y) for x, y in ((run.inputs, run.targets), read)))
    if attempt.failed:
        return f"whether the samples given to the probe are the training set could not be found out ({attempt.error})"
    return "" if same else "the samples given to the probe are not those of the training set"


def _sorted_rows(inputs: Inputs, targets: Tensor | None) -> Tensor:
    """Return each sample with its target as one row of numbers, sorted."""
    parts = [*input_tensors(inputs), *([] if targets is None else [targets])]
    rows = torch.cat([part.detach().cpu().double().reshape(len(part), -1) for part in parts], 1)
    ordered, counts = torch.unique(rows, dim=0, return_counts=True)
    every: Tensor = ordered.repeat_interleave(counts, 0)
    return every


def _read_alike(trainer: pl.Trainer, samples: Any, loader: DataLoader[Any], input_fn: InputFn | None) -> bool:
    """Return whether the first samples are the same tensors when they are read with other random seeds.

    Several samples are read, as an augmentation may leave one unchanged by chance.
    """
    read: list[Sequence[Tensor]] = []
    with unread(samples, loader.collate_fn):
        for seed in (1, 2):
            seed_all(seed)  # not seed_everything, which would leave its seed in the environment
            batch = transfer(trainer, loader.collate_fn([samples[i] for i in range(min(8, len(samples)))]))
            parts = [part for _, part in tensors_in(batch)] if input_fn is None else input_tensors(input_fn(batch))
            read.append([part.detach().cpu().clone() for part in parts])
    return all(torch.equal(a, b) for a, b in zip(*read, strict=True))
