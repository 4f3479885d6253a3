"""``search_factor``: from which length on an update of a run raises the loss of its probe."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_conv.callbacks.health.step_of_run import loss_in_outputs
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.step.critical_sharpness import CriticalFactor, critical_factor
from lightning_conv.losses.gradient import inner, wide
from lightning_conv.losses.of_outputs import evaluate
from lightning_conv.machine.memory import allowed_memory

COPIES = 40
"""Bytes per weight that the search takes, roughly: two copies in float64, and weights, gradient, update and state in float32."""

TOO_LARGE = "copies of the weights take more memory than is allowed (Probe(max_memory=...))"

TOLD = 0.02
"""Rounding of the loss over its change to first order at the critical factor, up to which the network's own type is enough."""

UNITS = 16
"""Units in the last place by which outputs are off, roughly."""


def search_factor(
    run: RunView,
    gradients: Mapping[str, Tensor],
    updates: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    start: float,
    as_trained: bool = False,
) -> CriticalFactor:
    """Search the critical factor with the network in its own type, and in float64 where rounding could decide.

    Args:
        run: The run at this moment.
        gradients: Of the loss on the probe, by the names of the updates.
        updates: u by name.
        weights: Those to which u is added, by name.
        start: The first factor that is tried.
        as_trained: See ``RunView.sample_loss``.

    Cost: six to sixteen forward passes of the probe, twice if need be.
    """
    device = "cpu" if run.module.device.type == "mps" else run.module.device  # Apple's GPUs do not have float64
    pairs = {name: (weights[name].detach().to(device), each.to(device)) for name, each in updates.items()}

    def search(dtype: torch.dtype | None) -> CriticalFactor:
        loss = run.sample_loss(dtype=dtype, as_trained=as_trained)

        def at(factor: float) -> float:
            return loss.value(at={name: w.double() + factor * u.double() for name, (w, u) in pairs.items()})

        return critical_factor(at, start=start)

    found = search(None)
    reach = found.upper if math.isfinite(found.upper) else found.lower
    slope = abs(inner({name: each.to(gradients[name]) for name, each in updates.items()}, gradients))
    return found if _rounding(run) <= TOLD * reach * slope else search(torch.float64)


def fits_in_memory(run: RunView, weights: Mapping[str, Tensor]) -> bool:
    """Return whether ``COPIES`` bytes for each of some weights are allowed.

    Args:
        run: The run at this moment.
        weights: Some of its weights.
    """
    needed = COPIES * sum(each.numel() for each in weights.values())
    return needed <= allowed_memory(run.measurement.probe.max_memory, run.module.device)


def _rounding(run: RunView) -> float:
    """Return how far the loss of the probe is off: roughly the sum of |s u|, of outputs u and its gradient s by them, in units of u."""
    u = run.shaped_outputs
    exact = wide(u)
    slope = evaluate(loss_in_outputs(run), exact).slope
    return UNITS * torch.finfo(u.dtype).eps * float((slope.reshape(exact.shape) * exact).abs().sum())
