"""``RunGradient``: the gradient that the run's first step has, beside the one that the observed loss gives through the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import _collect_rng_states
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.losses.judge_own_loss import allowed_units
from lightning_conv.callbacks.run.losses.run_loss import Kept
from lightning_conv.callbacks.run.step.step_outputs import StepOutputs
from lightning_conv.callbacks.run.steps import ChangesSteps
from lightning_conv.callbacks.run.twin import Twin


class RunGradient:
    """Compares the gradients of one training step of the run with J^T s, for the observed loss at the outputs of that step.

    Before the step it is run on a copy of the module, in the modes of the run, on the same batch and from the same random numbers; after
    the run's own backward pass the two are compared. A penalty that a ``backward`` or an ``on_after_backward`` of the user's adds, or a
    hook that changes gradients, is seen so; what ``on_before_optimizer_step`` of the module changes, is not.

    Args:
        trainer: Trainer of the run.
        kept: How the step makes the outputs.
        batch: The batch of the step.
        batch_idx: Its number.

    Raises:
        NotAFunctionError, NotATwinError, ...: The step cannot be run on a copy.

    Cost: a copy of the module, a forward pass and two backward passes; until the comparison as much memory as the gradients take.
    """

    def __init__(self, trainer: pl.Trainer, kept: Kept, batch: Any, batch_idx: int) -> None:
        module = trainer.lightning_module
        # Lightning clears the gradients of the optimizer's parameters between here and the backward pass.
        cleared = set() if is_overridden("optimizer_zero_grad", module) else _optimized(trainer)
        self._before = {
            name: p.grad.detach().clone()
            for name, p in module.named_parameters()
            if p.grad is not None and id(p) not in cleared
        }
        with isolated():
            before = _states()
            twin = Twin(trainer, module)
            loss, outputs, _ = StepOutputs(twin, batch, kept.places, 0, batch_idx).seen
            named = {name: each for name, each in twin.module.named_parameters() if each.requires_grad}
            slopes = torch.autograd.grad(loss, outputs, retain_graph=True)
            grads = torch.autograd.grad(outputs, list(named.values()), slopes, retain_graph=True, allow_unused=True)
            # A slope by one output that another one depends on has both ways in it.
            self._uncompared = before != _states() or _depend_on_each_other(outputs)
        self._units = allowed_units(twin.module, max(torch.finfo(each.dtype).eps for each in (loss, *outputs)))
        self._expected = {name: g for name, g in zip(named, grads, strict=True) if g is not None}

    @torch.no_grad()
    def difference(self, module: pl.LightningModule) -> str:
        """Return how the run's gradients differ from those expected; empty: they do not, or chance may explain it.

        Args:
            module: The run's, after its backward pass.
        """
        apart = size = 0.0
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            own = _dense(parameter.grad, parameter) - _dense(self._before.get(name), parameter)
            expected = _dense(self._expected.get(name), parameter)
            apart += float(torch.linalg.vector_norm(own - expected, dtype=torch.float64)) ** 2
            size += float(torch.linalg.vector_norm(expected, dtype=torch.float64)) ** 2
        if not apart < float("inf") or apart**0.5 <= self._units * size**0.5 or self._uncompared:
            return ""
        return (
            "the gradient of the run's own step is not that of the observed loss through the outputs (they differ by "
            f"{apart**0.5:.2g}, and it is {size**0.5:.2g} long)"
        )


def is_compared(trainer: pl.Trainer) -> bool:
    """Return whether the run's gradients are those of a single batch's loss: nothing accumulates, averages, scales or clips them."""
    if callbacks_of(trainer, ChangesSteps):
        return False
    scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
    automatic = trainer.lightning_module.automatic_optimization
    return automatic and trainer.world_size == 1 and trainer.accumulate_grad_batches == 1 and not scaled


def _optimized(trainer: pl.Trainer) -> set[int]:
    return {
        id(each) for optimizer in trainer.optimizers for group in optimizer.param_groups for each in group["params"]
    }


def _depend_on_each_other(outputs: Sequence[Tensor]) -> bool:
    """Return whether one of several outputs is made of another one."""
    for number, each in enumerate(outputs):
        others = [other for k, other in enumerate(outputs) if k != number]
        found = torch.autograd.grad(each.sum(), others, retain_graph=True, allow_unused=True) if others else ()
        if any(gradient is not None for gradient in found):
            return True
    return False


def _states() -> tuple[object, ...]:
    """Return the states of the global generators of torch, all GPUs, Python and NumPy."""
    states = _collect_rng_states()
    of_torch = [states["torch"], *states.get("torch.cuda", [])]
    numpy = states.get("numpy")
    return states["python"], None if numpy is None else repr(numpy), [each.numpy().tobytes() for each in of_torch]


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros((), device=parameter.device)
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    return dense.float() if dense.dtype.itemsize < 4 else dense
