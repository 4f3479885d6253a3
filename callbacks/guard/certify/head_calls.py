"""``HeadCalls``: the calls of the head in the steps of the run, with what entered it and the gradients by what it returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_conv.callbacks.guard.certify.checks import CheckName
from lightning_conv.callbacks.guard.certify.features_compared import Expected
from lightning_conv.callbacks.guard.certify.step_record import BatchRecord
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.quiet_hook import QuietHook
from lightning_conv.networks.watched import as_rows, entering


@dataclass(frozen=True)
class Call:
    """One call of the head."""

    features: Tensor  # h, what entered
    slopes: list[Tensor] = field(default_factory=list)  # s, by what was returned, each time it was differentiated


@dataclass
class Step:
    """Holds what happened between two steps of the optimizer."""

    calls: list[Call] = field(default_factory=list)
    batches: list[BatchRecord] = field(default_factory=list)
    differentiated: bool = False  # whether a gradient was differentiated

    @property
    def once(self) -> bool:
        """Tell whether the head was called once in each batch."""
        return len(self.calls) == len(self.batches) and all(each.calls == k for k, each in enumerate(self.batches))

    @property
    def is_compared(self) -> bool:
        """Tell whether a batch is one of phase 2."""
        return any(batch.batch is not None for batch in self.batches)

    def judged(self) -> list[tuple[Tensor, Tensor]]:
        """Return h and s of each call. Empty: no call for a batch, or none that was differentiated once, so that s is not known.

        The last gradient is that of the backward pass: the step may differentiate before it.
        """
        if not self.once or self.differentiated or not all(call.slopes for call in self.calls):
            return []
        return [(call.features, call.slopes[-1]) for call in self.calls]


def _differentiated(step: Step) -> Step:
    """Return a step with the calls that the backward pass reached; with all of them if it reached none."""
    kept = [bool(call.slopes) for call in step.calls]
    if all(kept) or not any(kept):
        return step
    calls = [call for call, keep in zip(step.calls, kept, strict=True) if keep]
    batches = [replace(each, calls=sum(kept[: each.calls])) for each in step.batches]
    return Step(calls, batches, step.differentiated)


class HeadCalls:
    """Records the calls of the head, from the start of a batch to its backward pass.

    Args:
        view: The run.
        tell: Function that is called with a check's name and what was seen.
    """

    def __init__(self, view: GuardView, tell: Callable[[CheckName, str], None]) -> None:
        self._view, self._head, self._tell = view, view.layer, tell
        self._step, self._is_open = Step(), False
        self._last: BatchRecord | None = None  # of the step that was taken last, whose closure may be called again

    def register(self) -> RemovableHandle:
        """Register the hook on the head."""
        return self._head.register_forward_hook(QuietHook(self._look), with_kwargs=True)

    def clear(self) -> None:
        """Forget all calls."""
        self._step, self._is_open, self._last = Step(), False, None

    def before_batch(self, batch: Any, expected: Expected | None) -> None:
        """Begin a batch. Calls of the head outside a batch are not looked at.

        Args:
            batch: The batch that the training step is about to see, where it must stay as it is; None: it may change.
            expected: The features that its samples must have; None: they are not known.
        """
        self._last, self._is_open = None, True
        self._step.batches.append(BatchRecord.of(batch, expected, len(self._step.calls)))

    def after_backward(self) -> None:
        """End the batch: what is called from now on does not enter the loss."""
        self._is_open = False

    def before_closure(self) -> None:
        """Begin the last batch once more: an optimizer such as LBFGS calls the training step several times."""
        if self._last is not None and not self._step.batches:
            self._step.batches.append(replace(self._last, calls=0))
            self._is_open = True

    def take(self) -> Step:
        """Return what happened since the last step, and begin the next one.

        Calls whose outputs got no gradient, as those of a hook that looks at the head, are left out where others got one.
        """
        taken, self._step, self._is_open = _differentiated(self._step), Step(), False
        self._last = taken.batches[-1] if taken.batches else self._last
        return taken

    @property
    def in_compared_batch(self) -> bool:
        """Tell whether a batch of phase 2 has begun since the last step."""
        batches = self._step.batches
        return bool(batches) and batches[-1].batch is not None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if not (self._is_open and isinstance(output, Tensor) and output.requires_grad):
            return  # a validation, a forward of the guard's own, or one without gradients
        if module is not self._head or module.weight is not self._view.head_parameters[0]:
            return  # a copy of the head, or one whose weight was replaced for this call
        if self._step.batches[-1].was_changed():
            self._tell("fixed inputs", "a batch was changed between the start of its step and the call of the head")
        if self.in_compared_batch and output.element_size() < 4:
            self._tell("full precision", f"the head computes in {output.dtype} in a training step")
        call, step = Call(as_rows(entering(args, dict(kwargs)))), self._step
        step.calls.append(call)

        def keep(gradient: Tensor) -> None:
            call.slopes.append(as_rows(gradient.detach()))
            step.differentiated |= gradient.requires_grad

        output.register_hook(keep)  # type: ignore[no-untyped-call]
