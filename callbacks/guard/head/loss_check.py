"""``LossCheck``: compares the loss of the training step with ``loss_fn`` in phase 2."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle

from lightning_conv.callbacks.guard.certify.gradients_compared import factor_of
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.quiet_hook import QuietHook
from lightning_conv.losses.of_outputs import ULPS, evaluate, rounding, slope_rounding
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, take
from lightning_conv.networks.undisturbed import undisturbed

# Errors of a batch without targets, or of a loss that cannot be called, which the measurement on the training set reports.
UNKNOWN = (MisconfigurationException, RuntimeError, TypeError, ValueError, IndexError, KeyError)


class LossCheck:
    """Compares the two losses on every batch until they differ.

    Where something follows the head: on the first batch, and on the batch after each call of ``again``.

    Of an optimizer that evaluates a step several times, as LBFGS does, the last evaluation is compared, whose loss the trainer gives.

    Args:
        view: Run, with its network split into trunk and head.

    Attributes:
        unseen: What to say where the last batch could not be compared, though it should have been; empty otherwise.
    """

    def __init__(self, view: GuardView) -> None:
        self._view = view
        self._known = view.loss.loss_fn is not None
        self._wanted = self._known
        self._every = view.head.last
        self.unseen = ""
        self._outputs: Tensor | None = None  # of the network on the batch that is compared
        self._targets: Tensor | None = None
        self._shape: torch.Size | None = None  # of a sample's outputs, once they were computed
        self._seen: list[
            tuple[Tensor, list[Tensor]]
        ] = []  # outputs of the head in the training step, with gradients by them
        self._hook: RemovableHandle | None = None
        self._before: list[Tensor] = []  # the head before the step of the batch that is compared

    def again(self) -> None:
        """Schedule a comparison on the next batch: a term of the loss may become active only later."""
        self.release()
        self._wanted = self._known

    def end(self) -> None:
        """Make no comparison any more: the losses are known to differ."""
        self.release()
        self._known = self._wanted = False

    def before(self, batch: Any) -> None:
        """Prepare the comparison on a batch, if one is wanted: ``loss_fn`` is evaluated on the outputs of the head in the training step.

        Args:
            batch: The batch that the training step is about to see.
        """
        if not self._wanted:
            return
        self.release()  # a batch that was skipped (``on_train_batch_start`` gave -1) has no end
        self._before = [parameter.detach().clone() for parameter in self._view.head_parameters]
        self._outputs = None
        with attempted(*UNKNOWN):
            self._targets = self._view.loss.targets_of(batch)
            inputs = self._view.data.inputs_in(batch)
            if not self._view.head.last:  # its output is not the network's
                self._outputs = self._network_on(inputs)
                return
            self._shape = self._network_on(take(inputs, slice(2))).shape[1:] if self._shape is None else self._shape
            self._hook = self._view.layer.register_forward_hook(QuietHook(self._look))

    def _network_on(self, inputs: Inputs) -> Tensor:
        with undisturbed(self._view.network), torch.no_grad():
            module = StatelessModule(self._view.network)
            outputs = module.call({}, module.convert(inputs))
        assert isinstance(outputs, Tensor)
        return outputs

    def _look(self, module: nn.Module, inputs: Any, outputs: Tensor) -> None:
        if not outputs.requires_grad:  # an accuracy, say
            return
        if isinstance(self._view.trainer.optimizers[0], LBFGS):
            self._seen = []
        slopes: list[Tensor] = []
        self._seen.append((outputs.detach().clone(), slopes))
        outputs.register_hook(lambda slope: slopes.append(slope.detach()))  # type: ignore[no-untyped-call]

    def after_backward(self) -> None:
        """Look at no calls of the head any more: what is called from now on does not enter the loss."""
        if self._hook is not None and not isinstance(self._view.trainer.optimizers[0], LBFGS):
            self._hook.remove()

    def after(self, loss: Tensor | None) -> str | None:
        """Compare the loss of the training step with that of ``loss_fn``, up to the rounding of the step (``rounding``).

        Its gradient by the outputs is compared, too, up to one factor: a backward pass need not give the gradient of the value.

        Args:
            loss: Loss of the training step; None: not known.

        Returns:
            A string that names both losses if they differ on any rank; otherwise None.
        """
        self.unseen = ""
        if not self._wanted:
            return None
        self._wanted, stepped = self._every, math.nan if loss is None else float(loss)
        hooked, reached = self._hook is not None, [each for each in self._seen if each[1]]
        seen = reached or self._seen  # what the backward pass did not reach, a hook of the user's has looked at
        self.release()
        said, compared = "", False
        with attempted(*UNKNOWN):
            if hooked and len(seen) == 1 and self._shape is not None:  # of several calls, which enters the loss?
                self._outputs = seen[0][0].reshape(len(seen[0][0]), *self._shape)
            if self._outputs is not None:
                slopes = seen[0][1] if hooked and len(seen) == 1 else []
                said = self._other(self._outputs, stepped, slopes[0] if len(slopes) == 1 else None)
                compared = True
        missed = not compared and self._every and loss is not None
        told = self._view.ranks.gather(lambda: (said, missed))
        if any(each for _, each in told):
            self.unseen = f"the loss of a training step could not be compared with {self._view.loss.kind.name}"
        found = [each for each, _ in told]
        if not any(found):
            self._before = []
            return None
        self._known = self._wanted = False
        return (
            f"the training step minimises something else than the mean of {self._view.loss.kind.name} ({next(filter(None, found))} on a "
            f"batch at step {self._view.trainer.global_step})"
        )

    def _other(self, outputs: Tensor, stepped: float, slope: Tensor | None) -> str:
        """Return how the training step's loss, or its gradient by the outputs, differs from what it should be; empty if it does not."""
        assert self._targets is not None
        targets = self._targets

        def loss(u: Tensor) -> Tensor:
            return self._view.loss.of_step(u, targets)

        exact = evaluate(loss, outputs.double())
        own = evaluate(loss, outputs if outputs.dtype.itemsize >= 4 else outputs.float())
        scale = torch.finfo(outputs.dtype).eps / torch.finfo(own.outputs.dtype).eps
        if abs(stepped - exact.value) > scale * rounding(own, exact, own.steepness):  # False if one of them is NaN
            return f"{stepped:.9g} instead of {exact.value:.9g}"
        if slope is None or not (exact.finite and own.finite):
            return ""
        made, expected = slope.double().reshape(exact.slope.shape), exact.slope
        factor = factor_of([made], [expected])
        allowed = scale * ULPS * own.unit * float(expected.norm()) + scale * slope_rounding(own, exact)
        if not float((made - factor * expected).norm()) > factor * allowed:  # some of it may be NaN
            return ""
        return f"the same value, {stepped:.6g}, and another gradient"

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
