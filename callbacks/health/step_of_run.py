"""``StepOfRun``: the next step of a run on its probe: the Jacobian, the loss in the outputs, and what the optimizer makes of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.run.losses.run_loss import RunLoss
from lightning_conv.callbacks.run.step.optimizers import find_optimizer
from lightning_conv.callbacks.run.steps import changed_steps
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.kernel.forecast import LinearisedRun
from lightning_conv.health.kernel.kernel_modes import KernelModes, step_kernel
from lightning_conv.health.step.course import StabilityReading
from lightning_conv.health.step.optimizer_rules import StepSizes, largest_rate, momentum_of, step_sizes
from lightning_conv.health.step.sharpness import sharpness
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.losses.gradient import wide
from lightning_conv.losses.of_outputs import evaluate
from lightning_conv.losses.separation import curvature_product

FIRST, LATER = 20, 4
"""Products of the first search for the largest curvature, and of later ones, which begin with the last vector."""

MODES = 12
"""Products from which the kernel of a forecast is made: so many steps but one are continued exactly for a squared loss."""


class NoStepError(ValueError):
    """Nothing can be said of the steps of this run; the message says why."""


@dataclass(frozen=True)
class StepOfRun:
    """The next step at the weights of now.

    Attributes:
        run: The run at this moment.
        operator: J, with all outputs.
        sizes: How the optimizer turns gradients into steps.
        scale: By how much more samples a step has than the probe, where the loss is a sum over them; otherwise 1.
        outputs: u on the probe, in the shape that the loss takes.
    """

    run: RunView
    operator: NTKOperator
    sizes: StepSizes
    scale: float
    outputs: Tensor

    @classmethod
    def of(cls, run: RunView) -> StepOfRun:
        """Read the step.

        Args:
            run: The run at this moment.

        Raises:
            NoStepError: The loss is not known, something stands between gradient and step (clipping, manual optimization, own hooks),
                or the loss is a sum over a batch of unknown size.
            UnknownStepError: The optimizer is none of those whose rule is known, or has not stepped yet.

        Cost: seven forward passes of the probe.
        """
        if run.loss_unknown or run.loss_targets is None:
            raise NoStepError(run.loss_unknown or "no targets are known")
        if why := changed_steps(run.trainer, accumulated=True):
            raise NoStepError(why)
        sizes = step_sizes(optimizer_of(run), run.parameters)
        operator = NTKOperator(
            run.network, run.inputs, parameters=run.measurement.parameters, batch_norm=run.step_batch_norm
        )
        return cls(run, operator, sizes, batch_over_probe(run), wide(run.shaped_outputs))

    def stability(self, start: Tensor | None) -> tuple[StabilityReading, Tensor]:
        r"""Measure the stability ratio.

        .. math:: \lambda_{\max}\big( D^{1/2} (J^\top S J + W) D^{1/2} \big)

        with D the step sizes of the optimizer over the limit of its rule (``StepSizes.relative``), S the curvature of the run's loss in
        the outputs, and W what ``weight_decay`` adds. 1 is the edge of stability.

        Args:
            start: The vector of an earlier reading; None: there is none.

        Returns:
            The ratio, a Ritz value from below and an estimate from above; and the vector with which the next search begins.

        Raises:
            NoStepError: The loss bends downwards in all directions that were tried.

        Cost: ``FIRST`` or ``LATER`` products of a forward and a backward derivative each.
        """
        found = sharpness(
            self.operator,
            self.bent,
            {name: self.scale * self.sizes.relative(name) for name in self.sizes.scales},
            decay={name: each / self.scale for name, each in self.sizes.decay.items()},
            start=None if start is None or start.numel() != self.operator.n_parameters else start,
            products=FIRST if start is None else LATER,
        )
        if not found.value >= 0:
            raise NoStepError("the loss bends downwards at these outputs")
        rate = largest_rate(optimizer_of(self.run))
        return StabilityReading(self.run.step, found.value, max(found.upper, found.value), rate), found.vector

    def linearised(self) -> LinearisedRun | None:
        """Return the run of the linearised network from here on; None: the weights have several update rules, or the gradient is zero.

        Cost: ``MODES`` products of a backward and a forward derivative each.
        """
        rules = set(self.sizes.rules.values())
        point = evaluate(self.loss, self.outputs)
        if len(rules) > 1 or not bool((point.slope != 0).any()):
            return None
        scales = {name: self.scale * each for name, each in self.sizes.scales.items()}
        modes = KernelModes.of_products(step_kernel(self.operator, scales), point.slope, products=MODES)
        squared = self.run.scale
        return LinearisedRun(
            modes,
            self.outputs,
            self.loss,
            rule=next(iter(rules)),
            velocity=self._velocity(),
            curvature=None if squared is None else squared.k,
        )

    def _velocity(self) -> Tensor | None:
        """Return J times the momentum of the weights times their step sizes; None: there is none."""
        buffers = momentum_of(optimizer_of(self.run), self.run.parameters)
        if not buffers:
            return None
        moved = {
            name: self.sizes.scales[name].to(each) * each for name, each in buffers.items() if name in self.sizes.scales
        }
        weights = self.operator.shapes
        directions = {
            name: moved.get(name, torch.zeros(shape)).to(self.operator.device) for name, shape in weights.items()
        }
        return self.operator.jvp(directions).reshape(self.outputs.shape)

    @property
    def loss(self) -> Callable[[Tensor], Tensor]:
        """Return the run's loss of the probe in the outputs."""
        return loss_in_outputs(self.run)

    def bent(self, directions: Tensor) -> Tensor:
        """Return S v for v (n, C)."""
        v = directions.reshape(self.outputs.shape)
        return curvature_product(self.loss, self.outputs, v.to(self.outputs)).to(directions).reshape(directions.shape)


def loss_in_outputs(run: RunView) -> Callable[[Tensor], Tensor]:
    """Return the run's loss of the probe in the outputs u, which keeps neither the view nor copies of the weights.

    Args:
        run: The run, whose loss is known.
    """
    beside = run.loss_targets
    assert beside is not None
    return partial(_evaluated, run.run_loss, beside)


def _evaluated(loss: RunLoss, beside: Tensor, outputs: Tensor) -> Tensor:
    return loss.kind.evaluate(outputs, beside) if loss.own is None else loss.own(outputs, beside)


def optimizer_of(run: RunView) -> Optimizer:
    """Return the optimizer whose network is measured."""
    name, optimizers = run.measurement.probe.optimizer, run.trainer.optimizers
    return optimizers[0] if name is None else optimizers[find_optimizer(run.trainer, name).number]


def batch_over_probe(run: RunView) -> float:
    """Return by how much more samples a step has than the probe, where the loss is a sum over them; otherwise 1.

    Args:
        run: The run, whose loss is known.

    Raises:
        NoStepError: It is a sum over a batch of unknown size.
    """
    if not run.loss.summed:
        return 1.0
    try:
        size = run.sampling.largest_batch
    except MisconfigurationException:
        size = None
    if size is None:
        raise NoStepError("the loss is a sum over the batch, whose size the training loader does not tell")
    return size / run.samples
