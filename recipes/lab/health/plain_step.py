"""``PlainStep``: the next step of a run in plain torch: what ``ConvergenceHealth`` measures of it, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.health.step_of_run import FIRST, LATER, MODES
from lightning_conv.callbacks.run.outputs_on import outputs_on
from lightning_conv.health.kernel.forecast import LinearisedRun
from lightning_conv.health.kernel.kernel_modes import KernelModes, step_kernel
from lightning_conv.health.step.course import StabilityReading
from lightning_conv.health.step.optimizer_rules import momentum_of, step_sizes
from lightning_conv.health.step.sharpness import sharpness
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.losses.gradient import wide
from lightning_conv.losses.of_outputs import evaluate
from lightning_conv.losses.separation import curvature_product
from lightning_conv.networks.batch_norm import has_batch_norm


def operator_of(net: nn.Module, inputs: Tensor) -> NTKOperator:
    """Return the Jacobian of a network on a probe, through the statistics of BatchNorm, as a training step differentiates.

    Args:
        net: The network.
        inputs: The probe.
    """
    return NTKOperator(net, inputs, batch_norm="batch" if has_batch_norm(net) else "eval")


class PlainStep:
    """The next step at the weights of now, on a probe.

    Args:
        net: The network.
        operator: ``operator_of`` it; it follows the network.
        inputs: The probe.
        loss: The loss of the probe as a function of the outputs, a mean over the samples.
        optimizer: One of torch's.

    Raises:
        UnknownStepError: The optimizer has not stepped yet and its steps depend on that.

    Cost: a forward pass of the probe.
    """

    def __init__(
        self,
        net: nn.Module,
        operator: NTKOperator,
        inputs: Tensor,
        loss: Callable[[Tensor], Tensor],
        optimizer: Optimizer,
    ) -> None:
        self.loss, self._optimizer = loss, optimizer
        self._weights = dict(net.named_parameters())
        self.sizes = step_sizes(optimizer, self._weights)
        self.outputs = wide(outputs_on(net, inputs, "frozen")[0])
        operator.follow(net)
        self.operator = operator

    def ratio(self, step: int, start: Tensor | None) -> tuple[StabilityReading | None, Tensor | None]:
        """Return the stability ratio, and the vector with which the next search begins; None: it is not defined.

        Args:
            step: Optimizer steps done.
            start: The vector of an earlier search; None: there is none.

        Cost: ``FIRST`` or ``LATER`` products with the Jacobian.
        """
        try:
            found = sharpness(
                self.operator,
                self._bent,
                {name: self.sizes.relative(name) for name in self.sizes.scales},
                decay=self.sizes.decay,
                start=start,
                products=FIRST if start is None else LATER,
            )
        except ValueError:  # a product is not finite, as outputs of a run that blows up are not
            return None, start
        if not found.value >= 0:
            return None, start
        return StabilityReading(step, found.value, max(found.upper, found.value)), found.vector

    def linearised(self, curvature: float | None) -> LinearisedRun | None:
        """Return the run of the linearised network from here on; None: the gradient is zero, or a product is not finite.

        Args:
            curvature: As in ``LinearisedRun``.

        Cost: ``MODES`` products.
        """
        slope = evaluate(self.loss, self.outputs).slope
        if not bool((slope != 0).any()):
            return None
        (rule,) = set(self.sizes.rules.values())
        try:
            modes = KernelModes.of_products(step_kernel(self.operator, self.sizes.scales), slope, products=MODES)
        except ValueError:  # a product is not finite
            return None
        return LinearisedRun(modes, self.outputs, self.loss, rule=rule, velocity=self._velocity(), curvature=curvature)

    def _velocity(self) -> Tensor | None:
        buffers = momentum_of(self._optimizer, self._weights)
        if not buffers:
            return None
        moved = {
            name: self.sizes.scales[name].to(buffers[name]) * buffers[name] if name in buffers else torch.zeros(shape)
            for name, shape in self.operator.shapes.items()
        }
        return self.operator.jvp(moved).reshape(self.outputs.shape)

    def _bent(self, directions: Tensor) -> Tensor:
        v = directions.reshape(self.outputs.shape).to(self.outputs)
        return curvature_product(self.loss, self.outputs, v).to(directions).reshape(directions.shape)
