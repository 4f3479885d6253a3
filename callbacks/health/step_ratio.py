"""``stability_reading``: the curvature of the run's loss on the probe over the limit of the optimizer's steps."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_conv.callbacks.run.step.optimizers import find_optimizer
from lightning_conv.callbacks.run.steps import changed_steps
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.course import StabilityReading
from lightning_conv.health.optimizer_rules import step_sizes
from lightning_conv.health.sharpness import sharpness
from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.losses.separation import curvature_product

FIRST, LATER = 20, 4
"""Products of the first search for the largest curvature, and of later ones, which begin with the last vector."""


class NoRatioError(ValueError):
    """The stability ratio says nothing about the steps of this run; the message says why."""


def stability_reading(run: RunView, start: Tensor | None) -> tuple[StabilityReading, Tensor]:
    r"""Measure the stability ratio of the next step at the weights of now.

    .. math:: \lambda_{\max}\big( D^{1/2} (J^\top S J + W) D^{1/2} \big)

    with D the step sizes of the optimizer over the limit of its rule (``StepSizes.relative``), J the Jacobian and S the curvature of the
    run's loss on the probe, and W what ``weight_decay`` adds. 1 is the edge of stability.

    Args:
        run: The run at this moment.
        start: The vector of an earlier reading; None: there is none.

    Returns:
        The ratio, a Ritz value from below and an estimate from above; and the vector with which the next search begins.

    Raises:
        NoRatioError: The loss is not known, something stands between gradient and step (clipping, manual optimization, own hooks), or the
            loss is a sum over a batch of unknown size.
        UnknownStepError: The optimizer is none of those whose rule is known, or has not stepped yet.

    Cost: six forward passes of the probe, and ``FIRST`` or ``LATER`` products of a forward and a backward derivative each.
    """
    if run.loss_unknown or run.loss_targets is None:
        raise NoRatioError(run.loss_unknown or "no targets are known")
    if why := changed_steps(run.trainer, accumulated=True):
        raise NoRatioError(why)
    sizes = step_sizes(optimizer_of(run), run.parameters)
    scale = _batch_over_probe(run)
    relative = {name: scale * sizes.relative(name) for name in sizes.scales}
    decay = {name: each / scale for name, each in sizes.decay.items()}
    operator = NTKOperator(
        run.network, run.inputs, parameters=run.measurement.parameters, batch_norm=run.measurement.probe.batch_norm
    )
    u = run.measurement.shaped_outputs(run.module)
    found = sharpness(
        operator,
        lambda v: _bent(run, u, v),
        relative,
        decay=decay,
        start=None if start is None or start.numel() != operator.n_parameters else start,
        products=FIRST if start is None else LATER,
    )
    if not found.value >= 0:
        raise NoRatioError("the loss has no curvature from above at these outputs")
    return StabilityReading(run.step, found.value, max(found.upper, found.value)), found.vector


def optimizer_of(run: RunView) -> Optimizer:
    """Return the optimizer whose network is measured."""
    name = run.measurement.probe.optimizer
    return (
        run.trainer.optimizers[0] if name is None else run.trainer.optimizers[find_optimizer(run.trainer, name).number]
    )


def _bent(run: RunView, outputs: Tensor, directions: Tensor) -> Tensor:
    """Return S v for v (n, C)."""
    beside = run.loss_targets
    assert beside is not None
    v = directions.reshape(outputs.shape)
    if (own := run.run_loss.own) is not None:
        return own.curvature(outputs, beside, v).reshape(directions.shape)
    u = outputs.double() if outputs.device.type != "mps" else outputs
    with torch.enable_grad():
        made = curvature_product(lambda at: run.loss.evaluate(at, beside), u, v.to(u))
    return made.to(directions).reshape(directions.shape)


def _batch_over_probe(run: RunView) -> float:
    """Return by how much more samples a step has than the probe, where the loss is a sum over them; otherwise 1."""
    if not run.loss.summed:
        return 1.0
    try:
        size = run.sampling.largest_batch
    except MisconfigurationException:
        size = None
    if size is None:
        raise NoRatioError("the loss is a sum over the batch, whose size the training loader does not tell")
    return size / run.samples
