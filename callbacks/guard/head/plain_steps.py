"""The run's own optimizer where it is plain full-batch gradient descent on the head: its steps have a proven bound, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.caveats import ROUNDED
from lightning_conv.callbacks.guard.head.descent_bound import DescentBound, plan_bound
from lightning_conv.callbacks.guard.head.head_steps import (
    HeadWeights,
    OptimizerSteps,
    head_memory,
    head_problem,
    holds_features,
)
from lightning_conv.callbacks.guard.head.training_loss import TrainingLoss
from lightning_conv.callbacks.guard.state import GuardState
from lightning_conv.callbacks.run.steps import OWN_STEPS, ChangesSteps
from lightning_conv.callbacks.run.training_set import TrainingSet
from lightning_conv.expressivity import RankCertificate
from lightning_conv.kernels.products.gemm import calibrated
from lightning_conv.last_layer import HeadProblem, head_curvature
from lightning_conv.networks.head import Head
from lightning_conv.networks.precision import in_float64

AGREEMENT = 1e-4
"""Part of a step's length by which it may differ from -eta grad, beside the rounding of the weights."""


TOO_LARGE = "the features do not fit into memory beside the run; step_rule='certified' gives a bound all the same"
AFFORDED = 30.0
"""Predicted seconds that the bound may take at the switch, which nobody asked for."""
SHARE = 0.5
"""Of the calibrated rate of products that they reach."""


def predicted_seconds(samples: int, columns: int) -> float:
    """What the smaller Gram matrix of [h, 1] and its Cholesky factor take, roughly.

    Args:
        samples: n.
        columns: D.
    """
    smaller = min(samples, columns)
    flops = 2.0 * samples * columns * smaller + smaller**3 / 3
    return flops / (SHARE * calibrated("cpu", torch.float64, torch.get_num_threads())[1])


def head_rate(optimizer: Optimizer, head: Head) -> float | str:
    """The learning rate at which the optimizer is plain gradient descent on the head; or what it is instead.

    Args:
        optimizer: of the run.
        head: of its network.
    """
    if type(optimizer) is not torch.optim.SGD:
        return f"the optimizer is {type(optimizer).__name__}, not plain gradient descent"
    own = {id(parameter) for parameter in head.module.parameters() if parameter.requires_grad}
    rates = set()
    for group in optimizer.param_groups:
        if any(id(parameter) in own for parameter in group["params"]):
            if more := [name for name in ("momentum", "weight_decay", "nesterov", "maximize") if group.get(name)]:
                return f"SGD with {more[0]}={group[more[0]]} is not plain gradient descent"
            rates.add(float(group["lr"]))
    return rates.pop() if len(rates) == 1 else "the head's parameters have different learning rates"


def not_plain(trainer: pl.Trainer, head: Head, data: TrainingSet, loss: TrainingLoss) -> str:
    """Why the steps of the run are not those of full-batch gradient descent on a mean loss of the head; empty if they are.

    Each rank looks at its own part of the run, and does not communicate.

    Args:
        trainer: of the run.
        head: of its network.
        data: its training set.
        loss: on it.
    """
    if loss.loss_fn is None:
        return "the loss is not known; pass loss_fn= to the guard"
    if not head.last:
        return "something follows the head, so that the loss of its own outputs is not known"
    if getattr(loss.loss_fn, "reduction", "mean") != "mean":
        return f"{loss.name} is not the mean over the samples"
    if getattr(loss.loss_fn, "weight", None) is not None and trainer.accumulate_grad_batches * data.ranks.world > 1:
        return "class weights are divided batch by batch, so that a step is not that of the whole set"
    module, rate = trainer.lightning_module, head_rate(trainer.optimizers[0], head)
    if isinstance(rate, str):
        return rate
    if own := [name for name in OWN_STEPS if is_overridden(name, module)]:
        return f"the module has its own {own[0]}"
    if trainer.gradient_clip_val:
        return f"gradients are clipped (gradient_clip_val={trainer.gradient_clip_val})"
    if str(trainer.precision) in ROUNDED or getattr(trainer.precision_plugin, "scaler", None) is not None:
        return f"the gradients are rounded (precision {str(trainer.precision)!r})"
    changing = [c for c in trainer.callbacks if isinstance(c, (ChangesSteps, GradientAccumulationScheduler))]  # type: ignore[attr-defined]
    if changing:
        return f"{type(changing[0]).__name__} changes the steps"
    if not data.steps_are_whole(trainer.accumulate_grad_batches):
        return "the steps are those of mini-batches, whose bounds hold in expectation"
    return ""


def not_affordable(head: Head, data: TrainingSet, loss: TrainingLoss) -> str:
    """Why plain steps get no bound all the same: no L_ell, or it takes too long; empty if they do. All ranks come to the same.

    Args:
        head: of the network.
        data: the training set, whose targets are read.
        loss: on it.
    """
    loss.targets(data)  # by all ranks together; what comes after is local

    def mine() -> str:
        if loss.smoothness(data, head.module.out_features) is None:
            return f"{loss.name} has no Lipschitz gradient that is known"
        if (seconds := predicted_seconds(data.size, head.width + head.has_bias)) > AFFORDED:
            return (
                f"the bound would take about {seconds:.0f} s at the switch; step_rule='certified' gives it all the same"
            )
        return ""

    return first_of(data.ranks.gather(mine))


def first_of(reasons: Iterable[str]) -> str:
    """The first that is not empty."""
    return next((reason for reason in reasons if reason), "")


def is_step(weight: Tensor, was: Tensor, gradient: Tensor, rate: float) -> bool:
    """Whether a tensor is was - rate * gradient, up to rounding in its type.

    Args:
        weight: after the step.
        was: before it.
        gradient: by it.
        rate: eta.
    """
    now, before, step = in_float64(weight), in_float64(was), rate * in_float64(gradient)
    rounding = torch.finfo(weight.dtype).eps * float(before.norm() + step.norm())
    return float((now - before + step).norm()) <= AGREEMENT * float(step.norm()) + rounding


class PlainSteps(OptimizerSteps):
    r"""The optimizer goes on; its steps are counted, and looked at one by one: ``DescentBound``.

    Every step must be :math:`w - \eta g` with the run's own gradient g, and :math:`\eta \le 1 / L_H`. From the first one that is not,
    nothing is proven any more.

    Args:
        network: of the run.
        loss: on the training set.
        data: the training set.
        head: of the network.
        problem: the head's.
        memory: of the rule, in the checkpoint: written here once, and then counted on.
        certificate: of the trunk.

    Raises:
        ValueError: the loss has no Lipschitz gradient that is known.

    Cost: once, a dozen passes over the features and what ``comparators`` takes; the features are held meanwhile and afterwards (where they
    fit). A step costs a copy of the head.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: TrainingLoss,
        data: TrainingSet,
        head: Head,
        problem: HeadProblem,
        memory: dict[str, Any],
        certificate: RankCertificate | None,
    ) -> None:
        super().__init__(network, loss, data)
        self._head, self._problem, self._weights, self.memory = head, problem, HeadWeights(head), memory
        losses = problem.losses
        given = {"samples": problem.samples, "loss": losses.kind, "smoothness": losses.smoothness}
        if memory.get("given") != given:
            memory.clear()
            memory |= data.ranks.gather(lambda: self._plan(certificate))[0] | {"given": given}
        self._bound = DescentBound(problem, memory, memory["curvature"][-1], self._weights.parameters[0])
        self._due: tuple[list[Tensor], list[Tensor], float] | None = (
            None  # weights, gradients and rate of a step to come
        )

    def _plan(self, certificate: RankCertificate | None) -> dict[str, Any]:
        curvature = head_curvature(self._problem)
        bounds = [curvature.value.lower, curvature.value.value, curvature.value.upper]
        start = self._weights.read(self._problem)
        plan = {"rule": "base", "asked": "base", "whole": True, "curvature": bounds, "allowed": curvature.step}
        return plan | plan_bound(self._problem, start, curvature, certificate)

    def give_up(self, why: str) -> None:
        """From now on nothing is proven of these steps."""
        self._bound.give_up(why)

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep what the step should be made of."""
        self._due = None
        if "given_up" not in self.memory:
            with self._giving_up():
                self._keep(optimizer)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """What goes wrong ends the bound, and nothing else."""
        try:
            with torch.no_grad():
                yield
        except Exception as error:  # a figure for the log
            self._due = None
            self.give_up(f"a step could not be followed ({type(error).__name__}: {error})")

    def _keep(self, optimizer: Optimizer) -> None:
        rate = head_rate(optimizer, self._head)
        gradients = [parameter.grad for parameter in self._weights.parameters]
        present = [gradient.detach().clone() for gradient in gradients if gradient is not None]
        if isinstance(rate, str):
            self.give_up(rate)
        elif rate > self.memory["allowed"]:
            self.memory["largest"] = max(self.memory["largest"], rate)
            self.give_up(
                f"the learning rate {rate:.4g} is above 1 / L_H = {self.memory['allowed']:.4g}, up to which there is a proof"
            )
        elif len(present) < len(gradients):
            self.give_up("a step came without a gradient of the head")
        else:
            self._bound.before(self._weights.read(self._problem), rate)
            self._due = [parameter.detach().clone() for parameter in self._weights.parameters], present, rate

    def after_step(self) -> str | None:
        """Hold what the optimizer did against w - eta g."""
        due, self._due = self._due, None
        if due is not None:
            with self._giving_up():
                return self._compare(*due)
        return None

    def _compare(self, before: list[Tensor], gradients: list[Tensor], rate: float) -> str | None:
        for parameter, was, gradient in zip(self._weights.parameters, before, gradients, strict=True):
            if not is_step(parameter, was, gradient, rate):
                self.give_up("a step of the optimizer was not w - eta grad")
                return None
        return self._bound.after(self._weights.read(self._problem), rate)

    def measure(self) -> dict[str, float]:
        """Loss and gap of the network, the proven bound, and the learning rate of the last step."""
        found = super().measure()
        with self._giving_up():
            return found | self._bound.numbers(self._weights.read(self._problem))
        return found


def watched_steps(
    trainer: pl.Trainer,
    network: nn.Module,
    head: Head,
    data: TrainingSet,
    loss: TrainingLoss,
    state: GuardState,
) -> PlainSteps | str:
    """The run's own steps with their bound; or why there is none. All ranks come to the same.

    Args:
        trainer: of the run.
        network: of the run.
        head: of the network.
        data: the training set.
        loss: on it.
        state: of the guard, whose ``steps`` the plan is written into.
    """
    try:
        why = first_of(data.ranks.gather(lambda: "; ".join(state.caveats) or not_plain(trainer, head, data, loss)))
        if why := why or not_affordable(head, data, loss):
            return why
        # Said before the features are computed: that takes a pass through the trunk in float64.
        if not holds_features(data, head, allowed := head_memory(data)):
            return TOO_LARGE
        problem = head_problem(network, head, data, loss, allowed)
        return PlainSteps(network, loss, data, head, problem, state.steps, state.certificate)
    except Exception as error:  # a figure for the log
        return f"no bound could be set up ({type(error).__name__}: {error})"
