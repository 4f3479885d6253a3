"""Which hypotheses of the theorems a run breaks, found on the run itself: ``find_breaches``."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from lightning_conv.analytic import find_kinks
from lightning_conv.callbacks.batch import InputFn, take_inputs, training_samples, transfer
from lightning_conv.evaluation import Inputs, input_tensors, sample_count
from lightning_conv.losses import LossFacts, loss_facts

Hypothesis: TypeAlias = Literal[
    "descent", "unclipped", "full batch", "whole set", "no BatchNorm", "no dropout", "fixed data", "known loss", "squared loss",
    "attained infimum", "smooth",
]  # fmt: skip

EVERYWHERE: frozenset[Hypothesis] = frozenset(
    {"descent", "unclipped", "no BatchNorm", "no dropout", "fixed data", "known loss"}
)
"""What every theorem about gradient descent here asks for."""


@dataclass(frozen=True)
class Breach:
    """A hypothesis that does not hold in this run, and why."""

    hypothesis: Hypothesis
    reason: str


def breached(breaches: Iterable[Breach], asked: Iterable[Hypothesis]) -> str:
    """The reasons why a theorem that asks for these hypotheses does not apply; empty if it does."""
    wanted = set(asked)
    return "; ".join(dict.fromkeys(each.reason for each in breaches if each.hypothesis in wanted))


def find_breaches(
    trainer: pl.Trainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    loss_fn: object | None,
    outputs: Tensor,
    targets: Tensor | None,
    input_fn: InputFn | None,
) -> list[Breach]:
    """What does not change during a run; the optimizer, whose settings may, is asked at every step instead.

    Args:
        trainer: of the run.
        network: the module whose loss is meant.
        inputs: the probe's.
        loss_fn: of the training step, or None if it is not known.
        outputs: the network's on the probe.
        targets: of the probe, or None.
        input_fn: see ``Probe``.

    Cost: two readings of one sample, one forward of one sample.
    """
    return [
        *_of_loss(loss_fn, outputs, targets),
        *_of_network(network, inputs),
        *_of_data(trainer, sample_count(inputs), input_fn),
    ]


def facts_of(loss_fn: object, outputs: Tensor, targets: Tensor) -> LossFacts | None:
    """``loss_facts``; None too where the targets are not those of the loss, which is found out when it is evaluated."""
    try:
        return loss_facts(loss_fn, outputs, targets)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return None


def _of_loss(loss_fn: object | None, outputs: Tensor, targets: Tensor | None) -> list[Breach]:
    if loss_fn is None:
        why = "no loss module was found on the LightningModule (pass loss_fn=nn.MSELoss() or what the step uses)"
        return [Breach("known loss", why), Breach("squared loss", why), Breach("attained infimum", why)]
    name = type(loss_fn).__name__
    if targets is None:
        why = "no targets were found in a batch (pass Probe(target_fn=lambda batch: ...))"
        return [Breach("known loss", why)]
    found = []
    if type(loss_fn) is not nn.MSELoss:
        found.append(Breach("squared loss", f"the theorem is about the squared loss, and the run's is {name}"))
    facts = facts_of(loss_fn, outputs, targets)
    if facts is None:
        found.append(Breach("attained infimum", f"the infimum of {name} on these targets is not known"))
    elif not facts.attained:
        found.append(Breach("attained infimum", f"no weights attain the infimum of {name} on these targets"))
    return found


def _of_network(network: nn.Module, inputs: Inputs) -> list[Breach]:
    found = []
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        found.append(Breach("no BatchNorm", "BatchNorm couples the samples of a batch in training"))
    dropping = [m for m in network.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    if dropping:
        found.append(Breach("no dropout", f"dropout (p={dropping[0].p:g}) makes the loss random"))
    try:
        kinks = find_kinks(network, inputs)
    except Exception as error:
        return [*found, Breach("smooth", f"whether the network is smooth could not be found out ({error})")]
    if kinks:
        kinds = ", ".join(dict.fromkeys(str(kink) for kink in kinks[:3]))
        found.append(Breach("smooth", f"the network is not smooth in its weights ({kinds})"))
    return found


def _of_data(trainer: pl.Trainer, probe: int, input_fn: InputFn | None) -> list[Breach]:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None or not hasattr(loader.dataset, "__len__"):
        why = f"the training data ({type(loader).__name__}) have no random access, so that a step on all of them cannot be told"
        return [Breach("full batch", why), Breach("whole set", why)]
    samples, _ = training_samples(trainer, cure="")
    size, found = len(samples), []  # type: ignore[arg-type]
    world = trainer.world_size * (loader.batch_size or 1)
    if trainer.num_training_batches != 1 or world < size:
        found.append(Breach("full batch", f"mini-batches: {min(world, size)} of {size} samples a step"))
    if probe < size:
        found.append(
            Breach(
                "whole set",
                f"the probe has {probe} of the {size} training samples, so its loss is not the training loss",
            )
        )
    try:
        alike = _read_alike(trainer, samples, loader, input_fn)
    except Exception as error:
        return [*found, Breach("fixed data", f"whether inputs are fixed could not be found out ({error})")]
    if not alike:
        found.append(
            Breach("fixed data", "augmentation: an input differs when it is read again, so every step has another loss")
        )
    return found


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
