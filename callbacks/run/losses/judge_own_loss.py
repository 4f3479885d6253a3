"""``judge_own_loss``: whether the loss of the training step is a function of the outputs alone, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.losses.own_loss import OwnLoss
from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.step.step_outputs import StepOutputs
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.losses.of_outputs import ULPS, Point, evaluate
from lightning_conv.losses.separation import common_factor, is_same, separation
from lightning_conv.losses.slope import wrong_slope
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, map_inputs
from lightning_conv.networks.undisturbed import undisturbed

PASSED = 1024
"""Units of rounding by which two ways through the network may differ."""
LARGEST_SHARE = 0.05
"""Of the size of a gradient, beyond which two that differ are not called equal in any type."""


@dataclass(frozen=True)
class Asked:
    """What is judged: the step on all samples of the probe, and on a few of them.

    Attributes:
        trainer: Trainer of the run.
        twin: A copy of the module in eval mode.
        observed: How the step calls its network.
        parameters: Names of those that the kernel is over, as the copy has them.
        batch: The samples of the probe.
        few: The step on its first ones.
        points: The loss of these at some outputs, the present ones first.
    """

    trainer: pl.Trainer
    twin: Twin
    observed: Observed
    parameters: Sequence[str]
    batch: Any
    few: StepOutputs
    points: Sequence[Point]


def judge_own_loss(asked: Asked) -> OwnLoss | str:
    r"""Return the step's own loss if it is a function of the outputs alone, sample by sample; otherwise why not.

    Checked are, at the weights of now:

    - the value changes as the gradient says (``wrong_slope``), and samples do not couple (``separation``)
    - for the network as the kernel sees it, :math:`\phi(u)` is the value of the step, and :math:`J^\top s` by the engine the gradient of
      the step by the weights, on two batches: a penalty on the weights fails this
    - on the second batch, other samples in another order, and on the whole probe, each sample has the same gradient up to one factor,
      which tells a mean from a sum
    - after all of that value and gradient are what they were

    Raises:
        ValueError, RuntimeError, ...: The step, or the network, cannot be evaluated in one of these ways.

    Cost: some ten evaluations on few samples and two derivatives of the network on them; one evaluation on all samples.
    """
    few, (present, *_) = asked.few, asked.points
    if wrong := wrong_slope(few, present.outputs):
        return f"its gradient by the outputs is not that of its value ({wrong})"
    apart = separation(
        few, [present, *(each for each in asked.points if not torch.equal(each.outputs, present.outputs))]
    )
    if apart.reason:
        return apart.reason
    rows = torch.arange(few.samples)
    if differs := _beside(asked, few, present, rows):
        return differs
    order = _second(few.samples, asked.observed.samples)
    second = StepOutputs(asked.twin, asked.observed.some(asked.batch, order), few.places, len(order), few.batch_idx)
    if differs := _beside(asked, second, evaluate(second, second.present), order):
        return f"{differs}, on another batch"
    everything = StepOutputs(asked.twin, asked.batch, few.places, asked.observed.samples, few.batch_idx)
    depends = _dependence(asked, few, everything)
    if depends is None:
        return "what a sample adds to it depends on the rest of the batch, by more than one factor for all"
    if not is_same(evaluate(few, present.outputs), present):
        return "it changes each time that the step is run"
    return OwnLoss(asked.trainer, asked.batch, asked.observed, few.places, depends, apart)


def _second(few: int, samples: int) -> Tensor:
    """Return the samples of the second batch: the last ones, from the end, and one less where there are three."""
    count = few - 1 if few > 2 else few
    return torch.arange(samples - 1, -1, -1)[:count]


def _beside(asked: Asked, call: StepOutputs, point: Point, rows: Tensor) -> str:
    """Return how the step differs from phi(u) with u by the engine: in its value, or in its gradient by the weights."""
    loss = call.seen[0]
    network = asked.observed.network(asked.twin)
    inputs = _some(asked.observed.inputs(), rows)
    with isolated(), undisturbed(network), torch.no_grad():
        module = StatelessModule(network)
        u = module.outputs({}, module.convert(inputs)).reshape(point.outputs.shape)
    by_engine = evaluate(call, u.to(point.outputs))
    named = dict(asked.twin.module.named_parameters())
    trained = {name: named[name] for name in asked.parameters if named[name].requires_grad}
    units = allowed_units(asked.twin.module, point.unit)
    value = float(loss.detach())
    if not abs(by_engine.value - value) <= units * (by_engine.size + abs(value)):
        return f"it is {value:.6g}, and {by_engine.value:.6g} at the outputs of the network by itself"
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=True)
    with isolated():
        s = by_engine.slope.float() if by_engine.slope.dtype.itemsize < 4 else by_engine.slope
        operator = NTKOperator(network, inputs, parameters=list(trained), cotangents=s)
        ones = torch.ones(len(rows), dtype=torch.float64)
        signs = torch.randint(0, 2, ones.shape, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
        transposed, mixed = operator.vjp(ones), operator.vjp(signs)
    apart = size = other = 0.0
    for (name, parameter), grad in zip(trained.items(), grads, strict=True):
        own = torch.zeros_like(parameter) if grad is None else grad.to_dense() if grad.is_sparse else grad
        apart += float((own.detach().double() - transposed[name].double().to(own.device)).square().sum())
        size += float(transposed[name].double().square().sum())
        other += float(mixed[name].double().square().sum())
    if apart**0.5 <= units * max(size, other) ** 0.5:
        return ""
    return (
        "its gradient by the weights is not that through the outputs (they differ by "
        f"{apart**0.5 / max(size, other, 1e-300) ** 0.5:.2g} of it), as with a penalty on the weights"
    )


def allowed_units(module: nn.Module, unit: float) -> float:
    """Return the relative difference of two gradients that rounding may cause.

    Args:
        module: The module, whose weights may be in a coarse type.
        unit: Unit of rounding of outputs and loss.
    """
    types = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return min(PASSED * max([unit, *(torch.finfo(each).eps for each in types)]), LARGEST_SHARE)


def _some(inputs: Inputs, rows: Tensor) -> Inputs:
    return map_inputs(lambda tensor: tensor.index_select(0, rows.to(tensor.device)), inputs)


def _dependence(asked: Asked, few: StepOutputs, everything: StepOutputs) -> str | None:
    """Return how the loss depends on the batch, from the slopes of the same samples in batches of several sizes; None: in no such way."""
    n, m = everything.samples, few.samples
    u = everything.present
    generator = torch.Generator().manual_seed(1)
    u = u + torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u)  # no sample is fitted there
    order = _second(m, n).to(u.device)
    third = max(1, (m + 1) // 2)
    batches = [torch.arange(m, device=u.device), order, torch.arange(third, device=u.device)]
    whole, found = evaluate(everything, u), []
    for rows in batches:
        part = StepOutputs(asked.twin, asked.observed.some(asked.batch, rows), few.places, len(rows), few.batch_idx)
        own = evaluate(part, u.index_select(0, rows)).slope
        factor = common_factor(own, whole.slope.index_select(0, rows))
        if factor is None:
            zero = not bool(own.any()) and not bool(whole.slope.index_select(0, rows).any())
            if not zero:
                return None
            continue
        found.append((factor, n / len(rows)))
    if not found:
        return None
    for name, right in (("sum", lambda _: 1.0), ("mean", lambda ratio: ratio)):
        if all(abs(factor - right(ratio)) <= PASSED * ULPS * whole.unit * factor for factor, ratio in found):
            return name if any(ratio != 1 for _, ratio in found) else "mean"
    return "batch"
