"""Raw quantities of the theorems that no verdict follows from: how far weights, features and activation patterns are from the start.

Everything here is logged beside the verdicts; what is not defined for a network or a run is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

import lightning.pytorch as pl
from torch import Tensor

from lightning_conv.callbacks.clipping import RegularizedGradientClipping
from lightning_conv.callbacks.criteria.layer_norms import LayerNorms
from lightning_conv.callbacks.criteria.measured import Measured
from lightning_conv.callbacks.criteria.papers.frei_margins import margin_quantities, signs
from lightning_conv.callbacks.run.batch import to_device
from lightning_conv.callbacks.run.measurement import ProbeKernel
from lightning_conv.losses.scale import LossScale
from lightning_conv.theory.papers.allen_zhu import GradientRatios
from lightning_conv.theory.papers.chatterjee.ratio import least_radius
from lightning_conv.theory.papers.clipping import clipped_loss_bound
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import ExpressivityFacts
from lightning_conv.theory.tools.hidden_states import activity
from lightning_conv.theory.tools.observation import Observation, infimum_of_ratios


def probe_quantities(
    pl_module: pl.LightningModule,
    kernel: ProbeKernel,
    start: Mapping[str, Tensor],
    measured: Measured,
    norms: LayerNorms,
    seen: Observation,
    scale: LossScale | None,
    loss_fn: object | None,
) -> dict[str, float]:
    """All quantities of one measurement.

    Args:
        pl_module: with the weights of now.
        kernel: of the probe.
        start: weights at the start.
        measured: what was measured of them.
        norms: of the run's layers.
        seen: the observation of them.
        scale: of a squared loss, or None.
        loss_fn: of the training step, or None.
    """
    network, probe = kernel.probe.network(pl_module), kernel.probe
    named = dict(network.named_parameters())
    now = {name: named[name].detach() for name in start}
    # Distances are taken in float64, which Apple's GPUs do not have.
    now = {name: value.cpu() if value.device.type == "mps" else value for name, value in now.items()}
    begun = {name: value.to(now[name]) for name, value in start.items()}
    found = norms.quantities(now, begun) | measured.du.quantities(network, begun)
    found |= feature_quantities(measured.features)
    targets = kernel.targets
    if targets is not None and (scale is not None or signs(targets, loss_fn) is not None):
        outputs = kernel.outputs(pl_module)
        found |= margin_quantities(outputs, targets, loss_fn)
        if scale is not None:
            found |= largest_share(outputs, targets, scale.k, seen)
    looked = activity(network, to_device(kernel.inputs, pl_module.device), begun, batch_norm=probe.batch_norm)
    return found if looked is None else found | looked.quantities()


def feature_quantities(facts: ExpressivityFacts | object) -> dict[str, float]:
    """log phi, the ends of the spectrum and the ranks of [h, 1], and what the last layer cannot reach of the targets.

    sigma_min is the n-th singular value, 0 where there are fewer columns than samples; its lower bound is proven up to the estimated
    rounding inside the trunk, and 0 where nothing is.

    Args:
        facts: of the last hidden features, or anything else where there are none.
    """
    if not isinstance(facts, ExpressivityFacts):
        return {}
    certified = facts.certificate.sigma_min
    found = {
        "log_phi": facts.log_phi.value,
        "sigma_max": facts.sigma_max,
        "sigma_min": facts.sigma_min,
        "sigma_min_lower": math.nan if certified is None else certified.lower,
        "condition_number": facts.condition_number,
        "stable_rank": facts.stable_rank,
        "effective_rank": facts.effective_rank,
        "rank_share": facts.certificate.rank_lower / facts.certificate.n,
    }
    if facts.alignment is not None and facts.alignment.residual is not None:
        found["alignment_residual"] = facts.alignment.residual.value
    return _finite(found)


def path_quantities(history: Sequence[Observation], clipping: RegularizedGradientClipping | None) -> dict[str, float]:
    """What follows from the ratios |grad f|^2 / f seen so far.

    Args:
        history: of the run.
        clipping: of the run, or None.

    Returns:
        ``least_radius``: r_min = 2 sqrt(f_0 / inf a), the least for which Chatterjee's criterion can hold. ``clipped_contraction``:
        1 - eta delta mu / 2 with mu = inf a, the largest f_{t+1} / f_t that delta-GClip promises.
    """
    infimum = infimum_of_ratios(history)
    if not (0 < infimum < math.inf and history[0].loss > 0):
        return {}
    found = {"least_radius": least_radius(history[0].loss, infimum)}
    step = history[-1].step_size
    if clipping is not None and not math.isnan(step):
        with suppress(ValueError, KeyError):
            eta = step / clipping.metrics["clipping/factor"]
            found["clipped_contraction"] = clipped_loss_bound(1.0, eta=eta, delta=clipping.delta, mu=infimum, steps=1)
    return _finite(found)


def largest_share(outputs: Tensor, targets: Tensor, k: float, seen: Observation) -> dict[str, float]:
    """|grad f|^2 / max_i f_i with f_i = (k / 2) |u_i - y_i|^2, a sample's share of f = k S.

    Args:
        outputs: u, a row a sample.
        targets: y, as many numbers.
        k: the scale of the squared loss.
        seen: the observation of these weights.
    """
    if targets.numel() != outputs.numel() or math.isnan(seen.gradient_norm):
        return {}
    rows = outputs.double() - targets.to(outputs.device).double().reshape(outputs.shape)
    largest = k / 2 * float(rows.flatten(1).square().sum(1).max())
    return _finite({"gradient_over_largest": GradientRatios(seen.loss, largest, seen.gradient_norm**2).over_largest})


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
