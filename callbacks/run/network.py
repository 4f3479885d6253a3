"""``RunNetwork``: the network that is measured, and its samples; observed in the training step, or as the user has said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_conv.callbacks.run.batch import take_inputs, take_targets
from lightning_conv.callbacks.run.observation import Observed, observe
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.training_set import seed_all
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.networks.evaluation import Inputs, input_tensors, map_inputs, sample_count
from lightning_conv.networks.observed.leaves import tensors_in


@dataclass(frozen=True)
class RunNetwork:
    """The network of a run, and the samples on which it is measured.

    Attributes:
        probe: Its settings.
        inputs: The samples, on the CPU.
        targets: Their targets; None: not known.
        observed: How the training step calls its network; None: the user has said it, by ``forward_fn``, ``input_fn`` or ``inputs``.
    """

    probe: Probe
    inputs: Inputs
    targets: Tensor | None
    observed: Observed | None = None

    @property
    def words(self) -> str:
        """How the network was found, for a user."""
        if self.observed is not None:
            return f"observed: {self.observed.words}"
        return "given: the network is called as the Probe says"

    def network(self, twin: Twin) -> nn.Module:
        """Return the network over the weights of a copy of the module.

        Args:
            twin: The copy, in eval mode.
        """
        return self.probe.network(twin.module) if self.observed is None else self.observed.network(twin)

    def on(self, stored: Inputs, targets: Tensor | None) -> RunNetwork:
        """Return the same network with samples from a checkpoint.

        Args:
            stored: The samples.
            targets: Their targets.

        Raises:
            MisconfigurationException: They are not what the network of this run takes.
        """
        now, then = input_tensors(self.inputs), input_tensors(stored)
        if [each.shape[1:] for each in now] != [each.shape[1:] for each in then]:
            raise MisconfigurationException(
                f"Probe: the checkpoint has samples of the shapes {[tuple(each.shape) for each in then]}, and the training step takes "
                f"{[tuple(each.shape) for each in now]}; begin a new run, or pass Probe(inputs=...)"
            )
        return replace(self, inputs=stored, targets=targets)


def is_given(probe: Probe) -> bool:
    """Return whether the user has said how the network is called."""
    return any(each is not None for each in (probe.forward_fn, probe.input_fn, probe.inputs))


def copy_of(trainer: pl.Trainer, module: pl.LightningModule) -> Twin:
    """Return a copy of the module in eval mode, on which things are measured."""
    twin = Twin(trainer, module)
    twin.module.eval()
    return twin


def network_of(trainer: pl.Trainer, probe: Probe, batch: Any, samples: int | None, *, seed: int = 0) -> RunNetwork:
    """Find the network of a run on a batch.

    Args:
        trainer: Trainer of the run.
        probe: The settings.
        batch: Samples as the training step gets them.
        samples: Their number; None: it is taken from the batch.
        seed: Of the random numbers that the step may draw.

    Raises:
        NotObservedError, NotATwinError, ...: The step cannot be observed on a copy.
    """
    if is_given(probe):
        inputs, targets = take_inputs(batch, probe.input_fn), take_targets(batch, probe.target_fn)
        return RunNetwork(probe, *kept(inputs, targets, probe.size))
    with isolate_rng():
        seed_all(seed)
        observed = observe(copy_of(trainer, trainer.lightning_module), batch, samples)
    inputs = observed.inputs()
    targets = take_targets(batch, probe.target_fn)
    if targets is not None and (not targets.ndim or len(targets) != sample_count(inputs)):
        targets = None
    return RunNetwork(probe, *kept(inputs, targets, sample_count(inputs)), observed)


def kept(inputs: Inputs, targets: Tensor | None, size: int) -> tuple[Inputs, Tensor | None]:
    """Return the first samples and their targets as copies on the CPU."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor[:size].detach().cpu().clone()

    return map_inputs(copied, inputs), None if targets is None else copied(targets)


def line_to_write(callback: str, batch: Any) -> str:
    """Return the line that says how the network is called, for this batch.

    Args:
        callback: Name of the callback.
        batch: A batch; its first floating tensor is taken for the input, or its first one.
    """
    found = list(tensors_in(batch))
    floating = [place for place, tensor in found if tensor.is_floating_point()]
    place: Sequence[Any] = (*floating, *(place for place, _ in found), ())[0]
    taken = "batch" + "".join(f"[{key!r}]" for key in place)
    return f"{callback}(probe=Probe(input_fn=lambda batch: {taken}, forward_fn=lambda module, x: module(x)))"


def is_lazy(module: nn.Module) -> bool:
    """Return whether parameters have no shape yet, because no sample has passed through their layers."""
    return any(isinstance(each, torch.nn.parameter.UninitializedTensorMixin) for each in module.parameters())
