"""``HeadWatch``: every step of the run is watched at the head: what its gradient is made of, and what moves its weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_conv.callbacks.guard.certify.checks import Check, CheckName
from lightning_conv.callbacks.guard.certify.features_compared import Expected
from lightning_conv.callbacks.guard.certify.gradients_compared import factor_of, product_rounding, same_or_clipped
from lightning_conv.callbacks.guard.certify.run_checks import optimizer_caveats
from lightning_conv.callbacks.guard.certify.step_record import BatchRecord
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.quiet_hook import QuietHook
from lightning_conv.linalg.rounding import unit_roundoff
from lightning_conv.networks.head_probe import same
from lightning_conv.networks.precision import product_roundoff
from lightning_conv.networks.watched import entering


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

    Cost: in every step one product as large as that of the head's gradient, and three copies of the head; under several ranks an average of
        two matrices of the head's size.
    """

    def __init__(self, view: GuardView) -> None:
        self._view, self._head = view, view.head.module
        self.found: list[Check] = []
        self._hooks: list[RemovableHandle] = []
        self._optimizer: Optimizer | None = None  # that has the hooks
        self._calls: list[
            tuple[Tensor, list[Tensor]]
        ] = []  # h of each call since the last step, with s once it is there
        self._batches: list[BatchRecord] = []  # since the last step
        self._left: list[Tensor] | None = None  # the head after the last step; None: it may be moved
        self._judged: tuple[list[Tensor], list[Tensor | None]] | None = None  # weights and gradients before a step
        self._twice = False  # whether a step since the last one of the optimizer differentiated a gradient
        self._accumulated: dict[int, Tensor] = {}  # gradients after the last backward pass, by parameter

    def begin(self) -> None:
        """Register the hooks. A second call does nothing."""
        if self._hooks:
            return
        optimizer = self._optimizer = self._view.trainer.optimizers[0]
        after = optimizer.register_step_post_hook(QuietHook(self._after_optimizer))
        # The first of these hooks sees what the optimizer made; another one may move the head.
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._hooks = [
            self._head.register_forward_hook(QuietHook(self._look), with_kwargs=True),
            optimizer.register_step_pre_hook(QuietHook(self._around_closure)),
            after,
            *(
                each.register_post_accumulate_grad_hook(partial(self._keep_gradient, number))  # type: ignore[no-untyped-call]
                for number, each in enumerate(self._view.head_parameters)
            ),
        ]

    def end(self) -> None:
        """Remove the hooks. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._calls, self._batches, self._left, self._judged = [], [], [], None, None
        self._accumulated = {}

    def moved_on_purpose(self) -> None:
        """Forget what the head was after the last step: the guard moves it."""
        self._left = self._judged = None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if not (self._batches and isinstance(output, Tensor) and output.requires_grad):
            return  # a validation, a forward of the guard's own, or one without gradients
        if module is not self._head or self._head.weight is not self._view.head_parameters[0]:
            return  # a copy of the head, or one whose weight was replaced for this call
        if self._batches[-1].was_changed():
            self._tell("fixed inputs", "a batch was changed between the start of its step and the call of the head")
        slopes: list[Tensor] = []
        self._calls.append((entering(args, dict(kwargs)), slopes))

        def keep(gradient: Tensor) -> None:
            slopes.append(gradient.detach())
            self._twice = self._twice or gradient.requires_grad

        output.register_hook(keep)  # type: ignore[no-untyped-call]

    def _keep_gradient(self, number: int, parameter: Tensor) -> None:
        if self._batches and self._batches[-1].batch is not None and parameter.grad is not None:
            self._accumulated[number] = parameter.grad.detach().clone()

    def before_batch(self, batch: Any = None, expected: Expected | None = None) -> None:
        """Begin a batch. Calls of the head outside a batch are not looked at.

        Args:
            batch: The batch that the training step is about to see, where it must stay as it is; None: it may change.
            expected: The features that its samples must have; None: they are not known.
        """
        self._batches.append(BatchRecord.of(batch, expected, len(self._calls)))

    @torch.no_grad()
    def before_step(self) -> None:
        """Compare the gradient of the head with what the batches since the last step make of it, and the head with what that step left."""
        if not self._hooks:
            return
        calls, batches, self._calls, self._batches = self._calls, self._batches, [], []
        if self._optimizer is not self._view.trainer.optimizers[0]:
            self._tell("steps of the rule", "another optimizer was put in the place of the run's")
        accumulated, self._accumulated = self._accumulated, {}
        self.compare_left()
        self._left = None
        once = len(calls) == len(batches) and all(batch.calls == k for k, batch in enumerate(batches))
        self._compare_features(calls, batches, once)
        # The last one is that of the backward pass: the step may differentiate before it.
        once, self._twice = once and not self._twice, False
        seen = [(h, slopes[-1]) for h, slopes in calls] if once and all(slopes for _, slopes in calls) else []
        # Several ranks would talk in every step of phase 1, too, which decides nothing.
        if self._view.ranks.world > 1 and all(batch.batch is None for batch in batches):
            return
        if all(self._view.ranks.gather(lambda: self._can_be_judged(seen))):
            self._judge(seen)
        elif any(batch.batch is not None for batch in batches):
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
            elif parameter is not None and parameter._backward_hooks:
                said = "the head has a hook on its gradient, which is compared up to rounding only"
                self._tell("gradients of the step", said)

    def _compare_features(
        self, calls: list[tuple[Tensor, list[Tensor]]], batches: list[BatchRecord], once: bool
    ) -> None:
        if not any(batch.expected for batch in batches):
            return
        if any(parameter.grad is None for parameter in self._view.head_parameters):
            self._tell(
                "steps of the rule", "a parameter of the head has no gradient, and the certificate counts it as trained"
            )
        if not once:
            said = f"the head was called {len(calls)} times in a step of {len(batches)} batches, so its features were not compared"
            self._tell("same features in the step", said)
        elif any(b.expected is not None and b.expected.unlike(h) for (h, _), b in zip(calls, batches, strict=True)):
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
        present, ranks = [each.grad for each in self._view.head_parameters if each.grad is not None], self._view.ranks
        coarsest = max(
            (each.dtype for each in (*present, *(s for _, s in calls))), key=lambda kind: torch.finfo(kind).eps
        )
        rows, wide = sum(len(h) for h, _ in calls), torch.promote_types(coarsest, torch.float32)
        h, s = (torch.cat([call[k].to(wide) for call in calls]) for k in (0, 1))
        made, sizes = [s.T @ h, s.sum(0)][: len(present)], [s.abs().T @ h.abs(), s.abs().sum(0)][: len(present)]
        unit = max(unit_roundoff(coarsest), product_roundoff(present[0])) / unit_roundoff(coarsest)
        made, sizes = ([ranks.mean(each) for each in some] for some in (made, sizes))
        allowed, underflow = unit * product_rounding(rows + ranks.world, coarsest), rows * torch.finfo(coarsest).tiny
        factor = factor_of(present, made)
        apart = any(
            bool(((actual - factor * each).abs() > factor * (allowed * size + underflow)).any())
            for actual, each, size in zip(present, made, sizes, strict=True)
        )
        if apart and all(bool(torch.isfinite(each).all()) for each in made):
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
            self._compare_judged()
            return None

        def followed() -> Any:
            made = closure()
            self._compare_judged()
            return made

        if "closure" in kwargs:
            return args, {**kwargs, "closure": followed}
        return (args[0], followed, *args[2:]), kwargs

    @torch.no_grad()
    def _compare_judged(self) -> None:
        judged, self._judged = self._judged, None
        if judged is None:
            return
        weights, gradients = judged
        if not all(map(same, weights, self._view.head_parameters)):
            self._tell(
                "steps of the rule", "something moved the head between the backward pass and the optimizer's step"
            )
        now = [parameter.grad for parameter in self._view.head_parameters]
        if any(each is not None for each in now) and (terms := optimizer_caveats(self._view.trainer, self._view.head)):
            self._tell("no other term in the optimizer", terms[0])  # its settings may have changed for this step
        if [each is None for each in now] == [each is None for each in gradients]:
            pairs = [(a, b) for a, b in zip(gradients, now, strict=True) if a is not None and b is not None]
            if same_or_clipped(self._view.trainer, [a for a, _ in pairs], [b for _, b in pairs]):
                return
        said = "something changes the gradient of the head between the backward pass and the optimizer's step"
        self._tell("gradients of the step", said)

    def _after_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._batches and self._batches[-1].batch is not None:  # the trainer's hooks before a step were not called
            self._tell("gradients of the step", "a step of the optimizer was made past the trainer")
        self._left = [parameter.detach().clone() for parameter in self._view.head_parameters]

    def _tell(self, name: CheckName, said: str) -> None:
        if not any(check.name == name for check in self.found):
            self.found.append(Check(name, False, f"{said} (first at step {self._view.trainer.global_step})"))
