"""``GradientWatch``: whether the gradients that the optimizer gets are those of the loss that the training step returns."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_conv.callbacks.guard.certify.checks import Check
from lightning_conv.callbacks.guard.certify.gradients_compared import (
    beside_the_outputs,
    distance,
    factor_of,
    norm_of,
    same_or_clipped,
)
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.call import StepCall
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.twin import Twin

ULPS = (
    256  # units of rounding by which a gradient may differ, relative to its norm, beside what a repetition differs by
)
# Hooks in which a module or another callback may change gradients.
MODULE_HOOKS = (
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
)
CALLBACK_HOOKS = ("on_after_backward", "on_before_optimizer_step")
BACKWARD = ("backward", "pre_backward")  # of strategies and precision plugins


class GradientWatch:
    """Follows some optimizer steps: the first one, those whose number is a power of two, and the last one before the switch.

    Where the backward pass is of the user's own making, it follows all of phase 2: a term may be added there in any step.

    The training step is run once more on a copy of the module in the run's own modes, from the run's random numbers, and its gradients
    are compared with ``p.grad`` where the optimizer is about to step; and ``p.grad`` after the step with what it was before, since clipping
    may scale it and nothing else may change it.

    Args:
        view: The run.

    Attributes:
        found: The last comparison; None: there was none yet.

    Cost: a copy of the weights and a training step for each batch of a step that is followed.
    """

    def __init__(self, view: GuardView) -> None:
        self._view = view
        self.found: Check | None = None
        self._begins, self._next = True, view.trainer.global_step
        self._follows_all = False
        self._batches: list[tuple[Any, int]] | None = None  # of the step that is followed; None: none is
        self._expected: list[Tensor] = []
        self._kept: list[Tensor | None] = []
        self._why = ""  # why the step could not be run on a copy
        self._beside = ""  # how its loss depends on the head beside its outputs

    def again(self) -> None:
        """Follow the next step, whatever its number: phase 2 begins."""
        self._next, self._follows_all = self._view.trainer.global_step, _has_own_backward(self._view)

    def before_batch(self, batch: Any, batch_idx: int, last: int | None = None) -> None:
        """Add the gradients of a batch, if its step is followed.

        Args:
            batch: The batch that the training step is about to see.
            batch_idx: Its number in the epoch.
            last: Number of the last step before the switch, where it is known.
        """
        step = self._view.trainer.global_step
        if self._begins and (step >= self._next or step == last):
            self._batches, self._expected, self._why, self._beside = [], [], "", ""
            self._next = step + 1 if self._follows_all else max(2 * step, step + 1)
        self._begins = False
        if self._batches is None:
            return
        self._batches.append((batch, batch_idx))
        with attempted(Exception) as attempt:  # the step is any code of the user's
            made = self._gradients(batch, batch_idx)
            self._expected = [a + b for a, b in zip(self._expected, made, strict=True)] if self._expected else made
        self._why = self._why or attempt.reason

    def _gradients(self, batch: Any, batch_idx: int) -> list[Tensor]:
        twin = Twin(self._view.trainer, self._view.module)
        weights = [each for each in twin.module.parameters() if each.requires_grad]
        seen = StepCall(twin, self._view.head_name, batch, batch_idx).observe()
        self._beside = self._beside or beside_the_outputs(self._view, twin, seen)
        # Compiled code keeps nothing for a second backward pass, so that through the whole network comes last.
        parts = torch.autograd.grad(seen.loss, weights, allow_unused=True)
        whole = [torch.zeros_like(each) if part is None else part for part, each in zip(parts, weights, strict=True)]
        return [each / self._view.trainer.accumulate_grad_batches for each in whole]

    @property
    def follows(self) -> bool:
        """Whether the step that comes is followed."""
        return self._batches is not None

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [each for each in self._view.module.parameters() if each.requires_grad]

    def before_step(self) -> None:
        """Compare the gradients, if the step is followed. All ranks call it together."""
        batches, self._batches = self._batches, None
        if batches is None:
            self._kept = []  # the optimizer asks for the gradient again, at other weights, as LBFGS does
            return
        found = self._view.ranks.gather(lambda: self._why)
        if why := next(filter(None, found), ""):
            self.found = Check("gradients of the step", None, f"the training step could not be run on a copy: {why}")
            return
        with torch.no_grad():
            expected = [self._view.ranks.mean(each) for each in self._expected]
            actual = [torch.zeros_like(each) if each.grad is None else each.grad.detach() for each in self._weights]
            self._kept = [None if each.grad is None else each.grad.detach().clone() for each in self._weights]
            if not all(bool(torch.isfinite(each).all()) for each in actual):
                return  # the scaler leaves such a step out
        # A hook may clip before the trainer does.
        factor = min(factor_of(actual, expected), 1.0)
        apart, size = distance(actual, [factor * each for each in expected]), factor * norm_of(expected)
        eps = max(torch.finfo(each.dtype).eps for each in actual)
        close = apart <= ULPS * eps * size
        told = self._view.ranks.gather(lambda: (close, self._beside))
        if said := next((said for _, said in told if said), ""):
            self.found = Check("gradients of the step", False, f"{said} (at step {self._view.trainer.global_step})")
        elif all(near for near, _ in told):
            self.found = Check("gradients of the step", True)
        else:
            self.found = self._judge(batches[0], apart, size)

    def _judge(self, first: tuple[Any, int], apart: float, size: float) -> Check:
        """Judge gradients that differ: a step that draws random numbers differs from its own repetition."""

        def repeated() -> float:
            with attempted(Exception):
                torch.rand(1)  # other random numbers; the generator is put back by the caller
                some = self._gradients(*first)
                torch.rand(1)
                return distance(some, self._gradients(*first))
            return float("inf")

        with isolated():
            again = max(self._view.ranks.gather(repeated))
        if apart <= 16 * again:
            return Check(
                "gradients of the step", None, "the training step draws random numbers, so its gradients differ anyway"
            )
        return Check(
            "gradients of the step",
            False,
            f"the optimizer gets other gradients than those of the training step's loss: {apart / max(size, 1e-300):.2g} of their norm "
            f"apart at step {self._view.trainer.global_step} (a hook, a callback, or a backward of its own)",
        )

    def after_batch(self, stepped: bool) -> None:
        """Compare the gradients after the optimizer's step with those before it, if the step was followed.

        Args:
            stepped: Whether the optimizer has stepped.
        """
        self._begins = stepped
        kept, self._kept = self._kept, []
        if not kept or self.found is None or self.found.held is False:
            return
        pairs = [(was, each.grad) for was, each in zip(kept, self._weights, strict=False)]
        both = [(was, now) for was, now in pairs if was is not None and now is not None]
        changed = not same_or_clipped(self._view.trainer, [was for was, _ in both], [now for _, now in both])
        if any(self._view.ranks.gather(lambda: changed)):
            said = "something changes the gradients between the backward pass and the optimizer's step"
            self.found = Check("gradients of the step", False, said)

    def check(self) -> Check:
        """Return the last comparison; where no step was seen yet, whether anything could change the gradients of the first."""
        if self.found is not None:
            return self.found
        said = self._could_be_changed()
        return Check("gradients of the step", None if said else True, said)

    def _could_be_changed(self) -> str:
        module, trainer = self._view.module, self._view.trainer
        own = [name for name in MODULE_HOOKS if is_overridden(name, module)]
        others = [
            type(each).__name__
            for each in foreign_callbacks(trainer)
            if any(is_overridden(name, each) for name in CALLBACK_HOOKS)
        ]
        hooked = [name for name, each in module.named_parameters() if _hooks_of(each)]
        found = [f"the module overrides {', '.join(own)}"] * bool(own)
        found += [f"{', '.join(others)} may change gradients"] * bool(others)
        found += [f"{name!r} has a hook on its gradient" for name in hooked[:1]]
        return "no step was seen yet, and " + " and ".join(found) if found else ""


def foreign_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks that are neither Lightning's nor of this package.

    Args:
        trainer: Trainer of the run.
    """
    own = ("lightning.", "lightning_conv.")
    return [each for each in trainer.callbacks if not type(each).__module__.startswith(own)]  # type: ignore[attr-defined]


def _has_own_backward(view: GuardView) -> bool:
    trainer = view.trainer
    own = any(is_overridden(name, view.module) for name in ("backward", "on_before_backward"))
    others = any(is_overridden("on_before_backward", each) for each in foreign_callbacks(trainer))
    parts = [(each, name) for each in (trainer.strategy, trainer.precision_plugin) for name in BACKWARD]
    made = [getattr(each, name) for each, name in parts if hasattr(each, name)]
    return own or others or any(not each.__module__.startswith("lightning.") for each in made)


def _hooks_of(parameter: nn.Parameter) -> bool:
    hooks = [*(parameter._backward_hooks or {}).values()]
    hooks += (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
    own = "lightning_conv."  # hooks that only look
    return any(not getattr(each, "func", each).__module__.startswith(own) for each in hooks)
