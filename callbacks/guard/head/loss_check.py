"""``LossCheck``: compares the loss of the training step with ``loss_fn``, once per epoch of phase 2."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_conv.callbacks.guard.certify.caveats import ROUNDED
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.batch import InputFn, take_inputs
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.networks.evaluation import StatelessModule, undisturbed

# Relative difference up to which the loss of the training step counts as that of ``loss_fn``, in a float32 run.
AGREEMENT = 1e-3
# Errors of a batch without targets, or of a loss that cannot be called, which the measurement on the training set reports.
UNKNOWN = (MisconfigurationException, RuntimeError, TypeError, ValueError, IndexError, KeyError)


class LossCheck:
    """Compares the two losses on the first batch, and on the batch after each call of ``again``, until they differ.

    Args:
        view: Run, with its network split into trunk and head.
        input_fn: Function that takes the model's input out of a batch, see ``Probe``.
    """

    def __init__(self, view: GuardView, input_fn: InputFn | None) -> None:
        self._view, self._input_fn = view, input_fn
        self._known = view.loss.loss_fn is not None
        self._wanted, self._expected = self._known, math.nan
        self._targets: Tensor | None = None
        self._shape: torch.Size | None = None  # of a sample's outputs, once they were computed
        self._seen: list[Tensor] = []  # outputs of the head in the training step
        self._hook: RemovableHandle | None = None
        self._before: list[Tensor] = []  # the head before the step of the batch that is compared

    def again(self) -> None:
        """Schedule a comparison on the next batch: a term of the loss may become active only later."""
        self.release()
        self._wanted = self._known

    def before(self, batch: Any) -> None:
        """Prepare the comparison on a batch, if one is wanted.

        The first time, ``loss_fn`` is evaluated on a separate forward pass; later, on the outputs of the head in the training step.

        Args:
            batch: The batch that the training step is about to see.
        """
        if not self._wanted:
            return
        self.release()  # a batch that was skipped (``on_train_batch_start`` gave -1) has no end
        self._before = [parameter.detach().clone() for parameter in self._view.head_parameters]
        self._expected = math.nan
        with attempted(*UNKNOWN):
            self._targets = self._view.loss.targets_of(batch)
            if self._shape is not None and self._view.head.last:
                self._hook = self._view.head.module.register_forward_hook(self._look)
                return
            with undisturbed(self._view.network), torch.no_grad():
                module = StatelessModule(self._view.network)
                outputs = module.call({}, module.convert(take_inputs(batch, self._input_fn)))
            assert isinstance(outputs, Tensor)
            self._shape = outputs.shape[1:]
            self._expected = self._loss_of(outputs)

    def _look(self, module: nn.Module, inputs: Any, outputs: Tensor) -> None:
        self._seen.append(outputs.detach().clone())

    def _loss_of(self, outputs: Tensor) -> float:
        assert self._targets is not None
        found = self._view.loss.of(outputs.cpu().double(), self._targets.cpu())["loss"]
        return found * (len(outputs) if self._view.loss.kind.summed else 1)

    def after(self, loss: Tensor | None) -> str | None:
        """Compare the loss of the training step with that of ``loss_fn``.

        Args:
            loss: Loss of the training step; None: not known. It is read only where it is compared, to avoid a device synchronisation
                in every batch.

        Returns:
            A string that names both losses if they differ on any rank; otherwise None.
        """
        if not self._wanted:
            return None
        self._wanted, stepped, seen = False, math.nan if loss is None else float(loss), self._seen
        hooked = self._hook is not None
        self.release()
        if hooked and len(seen) == 1 and self._shape is not None:  # of several calls, which enters the loss?
            with attempted(*UNKNOWN):
                self._expected = self._loss_of(seen[0].reshape(len(seen[0]), *self._shape))
        trainer = self._view.trainer
        allowed = (0.1 if str(trainer.precision) in ROUNDED else AGREEMENT) * max(abs(self._expected), 1e-3)
        apart = abs(stepped - self._expected) > allowed  # False if one of them is NaN
        if not any(self._view.ranks.gather(lambda: apart)):
            self._before = []
            return None
        self._known = False
        return (
            f"the training step minimises something else than the mean of {self._view.loss.kind.name} ({stepped:.6g} instead of "
            f"{self._expected:.6g} on a batch at step {trainer.global_step})"
        )

    def release(self) -> None:
        """Remove the hook from the head, and drop the recorded outputs."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._seen = None, []

    @torch.no_grad()
    def take_back(self) -> None:
        """Restore the head's weights from before the batch that was compared."""
        for parameter, before in zip(self._view.head_parameters, self._before, strict=True):
            parameter.copy_(before)
        self._before = []
