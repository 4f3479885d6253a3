"""What moves the head in phase 2: the optimizer of the run, or gradient steps for which the theorem holds."""

from __future__ import annotations

import math
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.caveats import ROUNDED
from lightning_conv.callbacks.guard.head.descent_bound import DescentBound, plan_bound
from lightning_conv.callbacks.guard.head.training_loss import TrainingLoss
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.callbacks.run.training_set import TrainingSet, TrunkRows
from lightning_conv.expressivity import RankCertificate
from lightning_conv.expressivity.stream import read_rows
from lightning_conv.kernels.planning.memory import available_memory, blocks
from lightning_conv.last_layer import (
    HeadProblem,
    PowerSchedule,
    batch_curvature,
    head_curvature,
)
from lightning_conv.last_layer.problem import WORD
from lightning_conv.losses.per_sample import SampleLosses
from lightning_conv.networks.head import Head


class HeadSteps(Protocol):
    """A rule for the head; the hooks of phase 2 ask it."""

    def before_step(self, optimizer: Optimizer) -> None:
        """The gradients are there, the optimizer is about to step."""

    def after_step(self) -> str | None:
        """The optimizer has stepped: what it should not have done, None if all is well."""

    def measure(self) -> dict[str, float]:
        """Numbers for the history: loss, gap, bound, step_size, as far as they are known."""

    def give_up(self, why: str) -> None:
        """What was proven of the steps holds no longer."""


class OptimizerSteps:
    """The optimizer of the run goes on; the loss on the training set is measured."""

    def __init__(self, network: nn.Module, loss: TrainingLoss, data: TrainingSet) -> None:
        self._network, self._loss, self._data = network, loss, data

    def before_step(self, optimizer: Optimizer) -> None:
        """Nothing to do."""

    def after_step(self) -> str | None:
        """Nothing to say."""
        return None

    def measure(self) -> dict[str, float]:
        """Loss and gap, one pass over the training set."""
        return self._loss.measure(self._network, self._data)

    def give_up(self, why: str) -> None:
        """Nothing was."""


def head_memory(data: TrainingSet) -> int:
    """Bytes that the head's problem may take in each process, the same number on all ranks."""
    return min(data.ranks.gather(lambda: available_memory(torch.device("cpu")))) // 4 // data.ranks.world


def holds_features(data: TrainingSet, head: Head, allowed: int) -> bool:
    """Whether ``head_problem`` holds the features, in float64: those that take half of what is allowed.

    Args:
        data: the training set.
        head: of the network.
        allowed: bytes.
    """
    return 2 * WORD * data.size * head.width <= allowed


def head_problem(
    network: nn.Module, head: Head, data: TrainingSet, loss: TrainingLoss, allowed: int | None = None
) -> HeadProblem:
    """The convex problem of the head on the features of the frozen trunk, in float64.

    All ranks build it and compute with it alike: what is not held passes by in strips, which they compute together.

    Args:
        network: of the run.
        head: of the network.
        data: the training set.
        loss: on it.
        allowed: bytes that it may take, the same on all ranks; None: ``head_memory``.

    Raises:
        RuntimeError: it went wrong on one of several ranks; raised on all of them.
    """
    ranks, layer, targets = data.ranks, head.module, loss.targets(data)
    allowed = head_memory(data) if allowed is None else allowed
    named: dict[str, Any] = {"outputs": layer.out_features, "infimum": loss.given_infimum}
    # What may go wrong on one rank alone comes before the walks that all of them take part in.
    ranks.alike(lambda: SampleLosses(loss.loss_fn, targets, **named))
    rows = ranks.alike(lambda: data.feature_rows(network, head, torch.float64))
    held = _held(rows, ranks, allowed) if holds_features(data, head, allowed) else None

    def build() -> HeadProblem:
        return HeadProblem(
            rows if held is None else held,
            targets,
            loss.loss_fn,
            bias=head.has_bias,
            fixed_bias=head.fixed_bias,
            max_memory=allowed,
            **named,
        )

    return build() if held is None else ranks.alike(build)


def _held(source: TrunkRows, ranks: Ranks, allowed: int) -> Tensor:
    """All rows, read some at a time."""
    held = ranks.alike(lambda: torch.empty(source.samples, source.width, dtype=torch.float64))
    for some in blocks(source.samples, max(1, allowed // (4 * WORD * source.width))):
        held[some] = read_rows(source, some)
    return held


class HeadWeights:
    """W = [weight, bias] of the head, as ``HeadProblem`` stacks it."""

    def __init__(self, head: Head) -> None:
        self.parameters = [head.module.weight, *([head.module.bias] if head.has_bias else [])]

    def read(self, problem: HeadProblem) -> Tensor:
        """W, (D, C), float64."""
        return problem.stack(*self.parameters)

    @torch.no_grad()
    def write(self, problem: HeadProblem, w: Tensor) -> None:
        """Into the layer, in its type."""
        for parameter, part in zip(self.parameters, problem.split(w), strict=False):
            assert part is not None
            parameter.copy_(part.to(parameter))


class CertifiedSteps:
    r"""Plain gradient descent on the head, with steps for which phase 2 provably converges.

    If every optimizer step sees the whole training set: :math:`\eta = 1 / L_H`, and

    .. math:: L(w_t) - L^* \le \frac{L_H R^2}{2t}, \qquad \text{squared loss: also } (1 - \eta \mu)^{2t} (L(w_0) - L^*).

    Otherwise :math:`\eta_k = \eta_0 (1 + k / 1000)^{-3/4}` with :math:`\eta_0 = 1 / L_B`, L_B the largest curvature that a mini-batch
    can have: the sum of the steps is infinite, that of their squares finite.

    The gradient is the run's own (averaged over ranks and accumulated batches), before clipping. The step is made before the
    optimizer's, which finds no gradient and leaves the head alone.

    Args:
        trainer: of the run.
        problem: the head's.
        weights: of the head.
        data: the training set.
        memory: of the rule, in the checkpoint: written here once, and then counted on.
        certificate: of the trunk; its sigma_min gives the linear rate.

    Raises:
        ValueError: the loss has no Lipschitz gradient that is known.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        problem: HeadProblem,
        weights: HeadWeights,
        data: TrainingSet,
        memory: dict[str, Any],
        certificate: RankCertificate | None,
    ) -> None:
        self._problem, self._weights, self._memory = problem, weights, memory
        self._expected: list[Tensor] | None = None
        self._said: str | None = None
        given = data.ranks.broadcast(self._given(trainer, data))
        if memory.get("given") != given:  # nothing yet, or a plan for other steps or another loss
            memory.clear()
            memory |= data.ranks.gather(lambda: self._plan(trainer, given, certificate))[0]
        self._bound = DescentBound(problem, memory, memory.get("curvature", [math.inf])[-1], weights.parameters[0])

    def _given(self, trainer: pl.Trainer, data: TrainingSet) -> dict[str, Any]:
        """What the plan rests on beside the head: a run that resumes with something else needs another plan."""
        problem, losses = self._problem, self._problem.losses
        accumulated = trainer.accumulate_grad_batches
        # torch divides class weights by those of the batch: the mean over batches is another loss than that of the set.
        alike = getattr(losses.module, "weight", None) is None
        whole = (
            data.steps_are_whole(accumulated)
            and not any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            and (alike or accumulated * data.ranks.world == 1)
        )
        return {
            "samples": problem.samples,
            "whole": whole,
            "smallest": problem.samples if whole else data.smallest_batch if alike else 1,
            "exact": str(trainer.precision) not in ROUNDED,
            "loss": losses.kind,
            "smoothness": losses.smoothness,
            "infimum": None if problem.infimum is None else problem.infimum.lower,
        }

    def _plan(self, trainer: pl.Trainer, given: dict[str, Any], certificate: RankCertificate | None) -> dict[str, Any]:
        problem, start = self._problem, self._weights.read(self._problem)
        curvature, whole = head_curvature(problem), given["whole"]
        first = curvature.step if whole else 1 / batch_curvature(problem, given["smallest"], curvature)
        bounds = [curvature.value.lower, curvature.value.value, curvature.value.upper]
        plan: dict[str, Any] = {
            "rule": "certified",
            "given": given,
            "whole": whole,
            "first": first,
            "curvature": bounds,
        }
        if not whole:
            return plan | {"no_bound": "the steps are those of mini-batches, whose bounds hold in expectation"}
        if not given["exact"]:
            return plan | {"no_bound": f"the gradients are rounded (precision {str(trainer.precision)!r})"}
        return plan | plan_bound(problem, start, curvature, certificate)

    @property
    def step_size(self) -> float:
        """eta of the next step."""
        first: float = self._memory["first"]
        return first if self._memory["whole"] else PowerSchedule(first)(self._memory["taken"])

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """w <- w - eta grad L; the optimizer then finds no gradient."""
        gradients = [parameter.grad for parameter in self._weights.parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        # A gradient scaler leaves out the steps whose gradients overflow.
        if present and all(bool(torch.isfinite(gradient).all()) for gradient in present):
            eta, bounded = self.step_size, self._memory["whole"] and self._memory["given"]["exact"]
            if bounded:
                self._bound.before(self._weights.read(self._problem), eta)
            for parameter, gradient in zip(self._weights.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.add_(gradient.to(parameter.dtype), alpha=-eta)
            if bounded:
                self._said = self._bound.after(self._weights.read(self._problem), eta)
            else:
                self._memory["taken"] += 1
        for parameter in self._weights.parameters:
            parameter.grad = None
        if self._memory["taken"] <= 2:
            self._expected = [parameter.detach().clone() for parameter in self._weights.parameters]

    def after_step(self) -> str | None:
        """Whether the optimizer left the head alone, looked at in the first steps; and what was wrong with the step itself."""
        expected, self._expected = self._expected, None
        said, self._said = self._said, None
        if expected is None or all(torch.equal(a, b) for a, b in zip(expected, self._weights.parameters, strict=True)):
            return said
        return "the optimizer of the run moves the head although it has no gradient, so the certified steps are not the only ones"

    def measure(self) -> dict[str, float]:
        """Loss, gap, the proven bound of the gap, and the step size: one pass over the features."""
        w, infimum = self._weights.read(self._problem), self._problem.infimum
        value = self._problem.value(w)
        found = {"loss": value.value, "step_size": self.step_size}
        if infimum is not None:
            found["gap"] = value.value - infimum.value
        return found | self._bound.numbers(w, value)

    def give_up(self, why: str) -> None:
        """From now on nothing is proven of these steps."""
        self._bound.give_up(why)
