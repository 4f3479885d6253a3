"""``HeadWatch``: every step of the run is watched at the head: what its gradient is made of, and what moves its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_conv.callbacks.guard.certify.checks import Check, CheckName
from lightning_conv.callbacks.guard.certify.gradients_compared import made_by_outputs, same_or_clipped
from lightning_conv.callbacks.guard.certify.head_calls import HeadCalls, Step
from lightning_conv.callbacks.guard.certify.optimizer_copy import STEPS
from lightning_conv.callbacks.guard.certify.run_checks import other_term
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.quiet_hook import QuietHook
from lightning_conv.networks.head_probe import same


class HeadWatch:
    r"""Watches the head in every step, through hooks that change nothing.

    With h what enters the head, u what it returns, and s the gradient of the loss by u, all of the run's own step,

    .. math:: \frac{\partial L}{\partial W} = \sum_i s_i h_i^\top, \qquad \frac{\partial L}{\partial b} = \sum_i s_i

    hold where the loss depends on the head through u alone. A penalty on the head, in whichever step it acts, adds to the left side. In
    phase 2 h must be what was certified of these samples (``Expected``), and nothing may change the batch before the step sees it. Nothing
    but the optimizer, or the rule, may move the head: what it left is compared with what the next step starts from, and what it found,
    weights and gradient, with what was judged.

    The equations hold up to rounding, four times :math:`\gamma_{n + 2} \sum_i |s_i| |h_i|`, and up to one positive factor, by which a
    callback may have scaled all gradients, or clipping; the weights are compared bit for bit. Where the head is called several
    times in a step, or compiled code calls it, the gradient is not judged. Under several ranks both sides are averaged over them.

    Args:
        view: The run.

    Attributes:
        found: What was seen that should not be, as failed checks.
        calls: The calls of the head since the last step.
        move_head: Function that makes the rule's step where the optimizer makes its own; it may take the gradients away.

    Cost: in every step one product as large as that of the head's gradient, and three copies of the head; under several ranks an average of
        two matrices of the head's size.
    """

    def __init__(self, view: GuardView) -> None:
        self._view, self._head = view, view.layer
        self.found: list[Check] = []
        self.move_head: Callable[[], None] = lambda: None
        self._looks = 0  # at the optimizer
        self._hooks: list[RemovableHandle] = []
        self._optimizer: Optimizer | None = None  # that has the hooks
        self.calls = HeadCalls(view, self._tell)
        self._left: list[Tensor] | None = None  # the head after the last step; None: it may be moved
        self._judged: tuple[list[Tensor], list[Tensor | None]] | None = None  # weights and gradients before a step
        self._incoming: dict[int, Tensor] = {}  # gradient of this backward pass before all other hooks, by parameter
        self._accumulated: dict[int, Tensor] = {}  # gradients after the last backward pass

    def begin(self) -> None:
        """Register the hooks. A second call does nothing."""
        if self._hooks:
            return
        optimizer = self._optimizer = self._view.trainer.optimizers[0]
        after = optimizer.register_step_post_hook(QuietHook(self._after_optimizer))
        # The first of these hooks sees what the optimizer made; another one may move the head.
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._hooks = [
            self.calls.register(),
            optimizer.register_step_pre_hook(QuietHook(self._around_closure)),
            after,
        ]
        for number, each in enumerate(self._view.head_parameters):
            first = each.register_hook(partial(self._keep_incoming, number))  # type: ignore[no-untyped-call]
            each._backward_hooks.move_to_end(first.id, last=False)  # type: ignore[union-attr]
            last = each.register_post_accumulate_grad_hook(partial(self._keep_gradient, number))  # type: ignore[no-untyped-call]
            self._hooks += [first, last]

    def end(self) -> None:
        """Remove the hooks. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self.calls.clear()
        self._hooks, self._left, self._judged = [], None, None
        self._incoming, self._accumulated = {}, {}

    def moved_on_purpose(self) -> None:
        """Forget what the head was after the last step: the guard moves it."""
        self._left = self._judged = None

    def _keep_incoming(self, number: int, gradient: Tensor) -> None:
        if self.calls.in_compared_batch:
            self._incoming[number] = gradient.detach().clone()

    @torch.no_grad()
    def _keep_gradient(self, number: int, parameter: Tensor) -> None:
        incoming, before = self._incoming.pop(number, None), self._accumulated.get(number)
        if not self.calls.in_compared_batch or parameter.grad is None:
            return
        if incoming is not None and not same(incoming if before is None else before + incoming, parameter.grad):
            said = "the gradient of the head is not what the backward pass made it: a hook changes it, or it was not set to zero"
            self._tell("gradients of the step", said)
        self._accumulated[number] = parameter.grad.detach().clone()

    @torch.no_grad()
    def before_step(self) -> None:
        """Compare the gradient of the head with what the batches since the last step make of it, and the head with what that step left."""
        if not self._hooks:
            return
        step = self.calls.take()
        if self._optimizer is not self._view.trainer.optimizers[0]:
            self._tell("steps of the rule", "another optimizer was put in the place of the run's")
        accumulated, self._accumulated = self._accumulated, {}
        self.compare_left()
        self._left = None
        self._compare_features(step)
        # Several ranks would talk in every step of phase 1, too, which decides nothing.
        if self._view.ranks.world > 1 and not step.is_compared:
            return
        seen = step.judged()
        if all(self._view.ranks.gather(lambda: self._can_be_judged(seen))):
            self._judge(seen)
        elif step.is_compared:
            said = "the gradient of the head could not be compared with what its outputs make of it"
            self._tell("gradients of the step", said)
        self._compare_accumulated(accumulated)

    def compare_left(self) -> None:
        """Compare the head with what the last step left."""
        if self._left is not None and not all(map(same, self._left, self._view.head_parameters)):
            self._tell("steps of the rule", "something moved the head between two steps of the optimizer")

    def _compare_accumulated(self, gradients: Mapping[int, Tensor]) -> None:
        """Compare the gradients with what the backward pass left: the equations hold up to rounding, below which a penalty may hide."""
        if not gradients or self._scaled or self._view.ranks.world > 1:  # they are unscaled or averaged in between
            return
        for number, was in gradients.items():
            parameter = self._view.head_parameters[number] if number < len(self._view.head_parameters) else None
            if (
                parameter is not None
                and parameter.grad is not None
                and not same_or_clipped(self._view.trainer, [was], [parameter.grad])
            ):
                said = "something changes the gradient of the head after the backward pass"
                self._tell("gradients of the step", said)

    def _compare_features(self, step: Step) -> None:
        if not any(batch.expected for batch in step.batches):
            return
        if any(parameter.grad is None for parameter in self._view.head_parameters):
            self._tell(
                "steps of the rule", "a parameter of the head has no gradient, and the certificate counts it as trained"
            )
        if not step.once:
            said = (
                f"the head was called {len(step.calls)} times in a step of {len(step.batches)} batches, so its features were not "
                "compared"
            )
            self._tell("same features in the step", said)
        elif any(
            batch.expected is not None and batch.expected.unlike(call.features)
            for call, batch in zip(step.calls, step.batches, strict=True)
        ):
            self._tell(
                "same features in the step", "a training step computes other features than those that were certified"
            )

    @property
    def _scaled(self) -> bool:
        """Tell whether a gradient scaler stands between the loss and the gradients."""
        return getattr(self._view.trainer.precision_plugin, "scaler", None) is not None

    def _can_be_judged(self, calls: list[tuple[Tensor, Tensor]]) -> bool:
        gradients = [parameter.grad for parameter in self._view.head_parameters]
        return (
            bool(calls)
            and not self._scaled
            and all(each is not None and bool(torch.isfinite(each).all()) for each in gradients)
        )

    def _judge(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        """Compare the gradient with what these calls make of it. All ranks call it together.

        Args:
            calls: What entered the head, and the gradient by what it returned.
        """
        gradients = [each.grad for each in self._view.head_parameters if each.grad is not None]
        if not made_by_outputs(gradients, calls, self._view.ranks):
            self._tell("gradients of the step", "the gradient that the head gets is not that of a loss of its outputs")

    def hold(self) -> None:
        """Remember weights and gradient of the head, which the optimizer must find as they are."""
        if self._hooks:
            weights = [parameter.detach().clone() for parameter in self._view.head_parameters]
            self._judged = weights, [None if p.grad is None else p.grad.clone() for p in self._view.head_parameters]

    def _around_closure(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the comparison follow the closure, after which the optimizer moves the weights."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._at_step()
            return None

        def followed() -> Any:
            self.calls.before_closure()
            made = closure()
            self._at_step()
            return made

        if "closure" in kwargs:
            return args, {**kwargs, "closure": followed}
        return (args[0], followed, *args[2:]), kwargs

    @torch.no_grad()
    def _at_step(self) -> None:
        """Compare what the optimizer finds with what was judged, and let the rule make its step."""
        judged, self._judged = self._judged, None
        if judged is None:
            return
        self._compare_judged(judged)
        self.move_head()
        if any(parameter.grad is not None for parameter in self._view.head_parameters):  # the optimizer moves the head
            self._look_at_optimizer()

    def _look_at_optimizer(self) -> None:
        """Look at the optimizer's settings, which may be others in this step, and try copies of one that is none of torch's.

        They make as many steps as come until they are tried again.
        """
        tried, self._looks = self._looks % STEPS == 0, self._looks + 1
        if said := other_term(self._view, tried=tried):
            self._tell("no other term in the optimizer", said)

    def _compare_judged(self, judged: tuple[list[Tensor], list[Tensor | None]]) -> None:
        weights, gradients = judged
        if not all(map(same, weights, self._view.head_parameters)):
            self._tell(
                "steps of the rule", "something moved the head between the backward pass and the optimizer's step"
            )
        now = [parameter.grad for parameter in self._view.head_parameters]
        if [each is None for each in now] == [each is None for each in gradients]:
            pairs = [(a, b) for a, b in zip(gradients, now, strict=True) if a is not None and b is not None]
            if same_or_clipped(self._view.trainer, [a for a, _ in pairs], [b for _, b in pairs]):
                return
        said = "something changes the gradient of the head between the backward pass and the optimizer's step"
        self._tell("gradients of the step", said)

    def _after_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.calls.in_compared_batch:  # the trainer's hooks before a step were not called
            self._tell("gradients of the step", "a step of the optimizer was made past the trainer")
        self._left = [parameter.detach().clone() for parameter in self._view.head_parameters]

    def _tell(self, name: CheckName, said: str) -> None:
        if not any(check.name == name for check in self.found):
            self.found.append(Check(name, False, f"{said} (first at step {self._view.trainer.global_step})"))
