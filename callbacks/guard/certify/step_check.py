"""``compare_with_step``: whether the training step minimises the loss that the guard's claim is about, on a copy of the module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.checks import Check, CheckName
from lightning_conv.callbacks.guard.certify.copies import in_eval_mode, last_moment
from lightning_conv.callbacks.guard.certify.gradients_compared import depends_on_the_batch, norm_of
from lightning_conv.callbacks.guard.certify.step_features import SEEDS, features_of_step
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.call import StepCall
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated, seed_all
from lightning_conv.callbacks.run.step.drawn_weights import draw_weights
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.losses.of_outputs import ULPS, OutputLoss, Point, coupling, difference, settings
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, input_tensors
from lightning_conv.networks.undisturbed import undisturbed, without_fused_attention

EXAMINED = 16  # samples of a batch on which the loss is evaluated at many outputs
BACKWARD = 1000  # units of rounding of a gradient, relative to its norm: a backward pass through layers rounds more than a forward
MADE: tuple[CheckName, ...] = ("compared with the step", "same loss to the end", "same features in the step")
DRAWN = (1.0, 30.0, 1e3, 1e6)  # sizes of random weights, in units of the present ones


def compare_with_step(view: GuardView) -> list[Check]:
    r"""Compare the training step with the loss and the features that the guard's claim is about.

    The step runs on a copy of the module in eval mode, as phase 2 runs it, on samples from two places of the training set. With u the
    head's outputs, and outputs of choice put in their place,

    - the loss must not change, and have no gradient, when all weights are replaced by random ones and u is held: no penalty, no other head
    - it must not couple the samples (``coupling``), nor depend on them otherwise: in a batch of half of the samples, in the reverse order,
      its gradient by the outputs of these must be the same up to one factor (a mean is divided by their number)
    - it must be ``loss_fn``, if that is known, in value and gradient at outputs near and far (``difference``)
    - it must be the same at the run's last step and epoch: a term may set in later
    - its gradient by the weights must be J^T s, with J^T from the network as it is evaluated here and s the gradient by u
    - the features must be those of the network as it is evaluated here, also once the trunk is frozen; they must be the same among other
      samples of a batch, and in float64 (up to the root of the unit of rounding)

    each up to the rounding of the precision in use, as stated there.

    Args:
        view: The run.

    Returns:
        The checks ``MADE``. All ranks get the same.

    Cost: about 100 training steps of 16 samples, 17 forwards of two to 16 samples in float64, and some copies of the
        weights, one at a time.
    """
    found = [pair for pairs in view.ranks.gather(lambda: _local(view)) for pair in pairs]
    return list(dict.fromkeys(found))


def _local(view: GuardView) -> list[Check]:
    # The step is any code of the user's, and phase 2 runs it without fused attention.
    with attempted(Exception) as attempt, without_fused_attention():
        return _Comparison(view).checks()
    why = f"the training step could not be compared on a copy of the module: {attempt.reason}"
    return [Check(name, None, why) for name in MADE]


@dataclass(frozen=True)
class _Batch:
    inputs: Inputs
    whole: Any
    number: int = 0  # in the epoch
    half: Any = None  # the first half of its samples as a batch, in the reverse order


class _Comparison:
    def __init__(self, view: GuardView) -> None:
        self._view = view
        self._twin = in_eval_mode(view)
        self._engine = StatelessModule(view.network)

    def checks(self) -> list[Check]:
        said = dict.fromkeys(MADE, "")
        for batch in self._batches():
            call = self._call(self._twin, batch)
            points = [point for point in settings(call, call.observe().outputs) if point.finite]
            found = (
                self._departure(batch, points),
                self._later(batch, points),
                features_of_step(self._view, batch.inputs, batch.whole, batch.number),
            )
            said = {name: said[name] or new for name, new in zip(MADE, found, strict=True)}
        return [Check(name, not why, why) for name, why in said.items()]

    def _batches(self) -> Iterator[_Batch]:
        size, few = self._view.data.size, min(EXAMINED, self._view.data.size)
        for number, start in enumerate([0, size - few]):
            inputs, whole = next(self._view.data.batches(start, start + few))
            half = range(start, start + len(input_tensors(inputs)[0]) // 2)
            yield _Batch(inputs, whole, number, self._view.data.batch_of(half[::-1]) if half else None)

    def _departure(self, batch: _Batch, points: list[Point]) -> str:
        if not points:
            return "the loss of the training step is not finite"
        return (
            self._another_loss(batch, points)
            or self._beside_the_outputs(batch, points)
            or self._beside_the_outputs(batch, points[:1], *last_moment(self._view.trainer))
            or coupling(self._call(self._twin, batch), points)
            or self._targets_of_the_batch(batch, points)
            or (self._another_gradient(batch) if self._view.head.last else "")
        )

    def _targets_of_the_batch(self, batch: _Batch, points: list[Point]) -> str:
        """Return whether the loss of a sample depends on what else is in its batch, while the outputs are held."""
        samples = len(input_tensors(batch.inputs)[0])
        if batch.half is None or samples < 2:
            return ""
        each, half = len(points[0].outputs) // samples, samples // 2
        rows = torch.arange(each * half).reshape(half, each).flip(0).flatten()  # a sample may have several rows
        call = StepCall(self._twin, self._view.head_name, batch.half, batch.number)
        tried = (points[0], points[len(points) // 2])
        return next((said for point in tried if (said := depends_on_the_batch(point, rows, call))), "")

    def _call(self, twin: Twin, batch: _Batch) -> StepCall:
        return StepCall(twin, self._view.head_name, batch.whole, batch.number)

    def _another_loss(self, batch: _Batch, points: list[Point]) -> str:
        reference = self._reference(batch)
        if reference is None or not (apart := difference(points, reference)):
            return ""
        step = self._view.trainer.global_step
        name = self._view.loss.kind.name
        return f"the training step minimises something else than the mean of {name} ({apart} on a batch at step {step})"

    def _reference(self, batch: _Batch) -> OutputLoss | None:
        """Return ``loss_fn`` as a function of the head's outputs on a batch; None: it is not known."""
        loss = self._view.loss
        if loss.loss_fn is None or not self._view.head.last:
            return None
        targets, shape = loss.targets_of(batch.whole), self._result(batch).shape[1:]

        def reference(u: Tensor) -> Tensor:
            return loss.of_step(u.reshape(len(u), *shape), targets)

        return reference

    def _result(self, batch: _Batch) -> Tensor:
        with undisturbed(self._view.network), torch.no_grad():
            made = self._engine.call({}, self._engine.convert(batch.inputs))
        assert isinstance(made, Tensor)
        return made

    def _beside_the_outputs(
        self, batch: _Batch, points: list[Point], step: int | None = None, epoch: int | None = None
    ) -> str:
        """Return whether the loss depends on the weights when the outputs are held."""
        call = self._call(in_eval_mode(self._view, step, epoch), batch)
        u = points[0].outputs
        named = call.twin.module.named_parameters()
        weights = [w.requires_grad_() for name, w in named if name in call.twin.trained and w.is_floating_point()]
        loss = call(u)
        direct = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else ()
        moved = any(each is not None and bool((each != 0).any()) for each in direct)
        # At another step the loss may be another function, which is for another check to find.
        values = [point.value if step is None else float(call(point.outputs).detach()) for point in points[:2]]
        for seed, size in enumerate(DRAWN):
            draw_weights(call.twin, seed, size)
            for point, before in zip(points[:2], values, strict=True):
                now = float(call(point.outputs).detach())
                moved = moved or abs(now - before) > ULPS * points[0].unit * abs(before)
        return (
            f"the training step minimises something else than a loss of the outputs of {self._view.head_name!r}: it changes with the "
            "weights while these outputs are held"
            if moved
            else ""
        )

    def _later(self, batch: _Batch, points: list[Point]) -> str:
        """Return whether the loss is another one in the last batch of the run, or with other random numbers."""
        step, epoch = last_moment(self._view.trainer)
        batches = self._view.trainer.num_training_batches
        last_batch = replace(batch, number=int(batches) - 1 if math.isfinite(batches) else 1)
        call = self._call(in_eval_mode(self._view, step, epoch), last_batch)

        def then(u: Tensor) -> Tensor:
            return call(u.to(points[0].outputs))

        if apart := difference(points, then) if points else "":
            return f"the loss of the training step changes during the run ({apart}, compared with step {step})"
        with isolated():
            for seed in range(SEEDS):
                seed_all(seed)
                if apart := difference(points[:1], then) if points else "":
                    return f"the loss of the training step is random ({apart})"
        return ""

    def _another_gradient(self, batch: _Batch) -> str:
        """Return whether the gradient of the loss by the weights is another one than J^T s."""
        view, engine = self._view, self._engine
        call = self._call(in_eval_mode(view), batch)
        own = {
            name: each.requires_grad_()
            for name, each in call.twin.module.named_parameters()
            if each.is_floating_point()
        }
        seen = call.observe()
        prefix = view.prefix
        names = [name for name in own if prefix + name in engine.parameters]
        # Compiled code keeps nothing for a second backward pass, so that through the whole network comes last.
        (s,) = torch.autograd.grad(seen.loss, seen.outputs, retain_graph=True)
        total = torch.autograd.grad(seen.loss, [own[name] for name in names], allow_unused=True)
        with undisturbed(view.network):
            weights = {prefix + name: engine.parameters[prefix + name].detach().requires_grad_() for name in names}
            made = engine.call(weights, engine.convert(batch.inputs))
            assert isinstance(made, Tensor)
            expected = torch.autograd.grad(
                made, list(weights.values()), s.reshape(made.shape).to(made.dtype), allow_unused=True
            )
        pairs = zip(total, expected, strict=True)
        apart = norm_of(
            [a if b is None else b if a is None else a - b for a, b in pairs if a is not None or b is not None]
        )
        size = norm_of([each for each in expected if each is not None])
        if apart <= BACKWARD * torch.finfo(s.dtype).eps * size:
            return ""
        return (
            "the gradient of the training step is not that of a loss of the network's outputs (J^T s): they are "
            f"{apart / max(size, 1e-300):.2g} of its norm apart"
        )
