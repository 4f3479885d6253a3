"""``HeadWatch``: every step of the run is watched at the head: what its gradient is made of, and what moves its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_conv.callbacks.guard.certify.checks import Check, CheckName
from lightning_conv.callbacks.guard.certify.training_pass import product_rounding
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.linalg.rounding import unit_roundoff
from lightning_conv.networks.precision import product_roundoff
from lightning_conv.networks.watched import entering


class HeadWatch:
    r"""Watches the head in every step, through hooks that change nothing.

    With h what enters the head, u what it returns, and s the gradient of the loss by u, all of the run's own step,

    .. math:: \frac{\partial L}{\partial W} = \sum_i s_i h_i^\top, \qquad \frac{\partial L}{\partial b} = \sum_i s_i

    hold where the loss depends on the head through u alone. A penalty on the head, in whichever step it acts, adds to the left side. And
    between two steps nothing may move the head: what the optimizer left is compared with what the next step starts from.

    The first is exact up to rounding, four times :math:`\gamma_{n + 2} \sum_i |s_i| |h_i|`, and up to one positive factor, by which a
    callback may have scaled all gradients; the second is exact bit for bit. Where the head is called several
    times in a step, or compiled code calls it, the gradient is not judged; neither is it under several ranks, where it is averaged.

    Args:
        view: The run.

    Attributes:
        found: What was seen that should not be, as failed checks.

    Cost: in every step one product as large as that of the head's gradient, and a copy of the head.
    """

    def __init__(self, view: GuardView) -> None:
        self._view, self._head = view, view.head.module
        self.found: list[Check] = []
        self._hooks: list[RemovableHandle] = []
        self._calls: list[
            tuple[Tensor, list[Tensor]]
        ] = []  # h of each call since the last step, with s once it is there
        self._starts: list[int] = []  # number of calls at the start of each batch
        self._left: list[Tensor] | None = None  # the head after the last step; None: it may be moved

    def begin(self) -> None:
        """Register the hooks. A second call does nothing."""
        if self._hooks:
            return
        optimizer = self._view.trainer.optimizers[0]
        self._hooks = [
            self._head.register_forward_hook(self._look, with_kwargs=True),
            optimizer.register_step_post_hook(self._after_optimizer),
        ]

    def end(self) -> None:
        """Remove the hooks. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._calls, self._starts, self._left = [], [], [], None

    def moved_on_purpose(self) -> None:
        """Forget what the head was after the last step: the guard moves it."""
        self._left = None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if not (self._starts and isinstance(output, Tensor) and output.requires_grad):
            return  # a validation, a forward of the guard's own, or one without gradients
        if self._head.weight is not self._view.head_parameters[0]:
            return
        slopes: list[Tensor] = []
        self._calls.append((entering(args, dict(kwargs)), slopes))

        def keep(gradient: Tensor) -> None:
            slopes.append(gradient.detach())

        output.register_hook(keep)  # type: ignore[no-untyped-call]

    def before_batch(self) -> None:
        """Begin a batch. Calls of the head outside a batch are not looked at."""
        self._starts.append(len(self._calls))

    @torch.no_grad()
    def before_step(self) -> None:
        """Compare the gradient of the head with what the batches since the last step make of it, and the head with what that step left."""
        if not self._hooks:
            return
        calls, starts, self._calls, self._starts = self._calls, self._starts, [], []
        if self._left is not None and not all(map(torch.equal, self._left, self._view.head_parameters)):
            self._tell("steps of the rule", "something moved the head between two steps of the optimizer")
        self._left = None
        once = len(calls) == len(starts) and starts == list(range(len(starts))) and all(len(s) == 1 for _, s in calls)
        if calls and once and self._view.ranks.world == 1:
            self._judge([(h, slopes[0]) for h, slopes in calls])

    def _judge(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        gradients = [parameter.grad for parameter in self._view.head_parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        scaled = getattr(self._view.trainer.precision_plugin, "scaler", None) is not None
        if scaled or len(present) < len(gradients) or not all(bool(torch.isfinite(each).all()) for each in present):
            return
        coarsest = max(
            (each.dtype for each in (*present, *(s for _, s in calls))), key=lambda kind: torch.finfo(kind).eps
        )
        rows, wide = sum(len(h) for h, _ in calls), torch.promote_types(coarsest, torch.float32)
        h, s = (torch.cat([call[k].to(wide) for call in calls]) for k in (0, 1))
        made, sizes = [s.T @ h, s.sum(0)][: len(present)], [s.abs().T @ h.abs(), s.abs().sum(0)][: len(present)]
        unit = max(unit_roundoff(coarsest), product_roundoff(present[0])) / unit_roundoff(coarsest)
        allowed, underflow = unit * product_rounding(rows, coarsest), rows * torch.finfo(coarsest).tiny
        factor = _factor(present, made)
        apart = any(
            bool(((actual - factor * each).abs() > factor * (allowed * size + underflow)).any())
            for actual, each, size in zip(present, made, sizes, strict=True)
        )
        if apart and all(bool(torch.isfinite(each).all()) for each in made):
            self._tell("gradients of the step", "the gradient that the head gets is not that of a loss of its outputs")

    def _after_optimizer(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._left = [parameter.detach().clone() for parameter in self._view.head_parameters]

    def _tell(self, name: CheckName, said: str) -> None:
        if not any(check.name == name for check in self.found):
            self.found.append(Check(name, False, f"{said} (first at step {self._view.trainer.global_step})"))


def _factor(actual: list[Tensor], made: list[Tensor]) -> float:
    """Return the positive number c for which c times ``made`` is closest to ``actual``: a callback may scale the whole gradient."""
    squares = sum(float(each.double().square().sum()) for each in made)
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(actual, made, strict=True))
    return product / squares if squares > 0 and product > 0 else 1.0
