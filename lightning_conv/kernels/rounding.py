"""How much rounding inside the network there is in its Jacobian: measured against the same network in the other precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_conv.evaluation import BatchNormMode, Inputs, StatelessModule, map_inputs
from lightning_conv.kernels.recording import LayerCall, edges_of, record, signature_of
from lightning_conv.kernels.sites import Site, site_gradients, site_inputs

SAFETY = 4.0

LARGE = 8 * 2**20
"""Bytes of activations above which one sample tells enough: a large network in float64 takes as long as a small kernel."""


def parameter_gradients(
    module: StatelessModule, names: Sequence[str], inputs: Inputs, mixture: Tensor
) -> dict[str, Tensor | None]:
    """Autograd's own gradients of sum(mixture * outputs) by the named parameters; None for those it does not reach."""
    leaves = {name: module.parameters[name].detach().requires_grad_() for name in names}
    outputs = module.outputs(leaves, inputs)
    if not outputs.requires_grad:
        return dict.fromkeys(names)
    found = torch.autograd.grad((outputs * mixture.to(outputs)).sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(names, found, strict=True))


def estimate_jacobian_error(
    module: StatelessModule,
    sites: Sequence[Site],
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor],
    truth: Mapping[str, Tensor | None],
    inputs: Inputs,
    mixture: Tensor,
    *,
    activations: int,
    batch_norm: BatchNormMode,
    statistics_of: Inputs,
) -> float:
    """Estimated relative rounding error |dJ|_F / |J|_F of the Jacobian in the module's precision, with a safety factor of 4.

    Measured: the same random combination of Jacobian rows in float32 and in float64. For a float64 evaluation the measured
    float32 figure is scaled by 2^-29, the ratio of the unit roundoffs. An estimate, not a bound.

    Linear layers at one position are compared by their factors, d(b a^T) <= |db||a| + |b||da|, which saves forming
    gradients as large as the network; the other parameters by autograd's gradients.

    Args:
        module: the network.
        sites: what was found in it.
        calls: of a forward on ``inputs``.
        gradients: B of every call for ``mixture``.
        truth: autograd's gradients of sum(mixture * outputs).
        inputs: a few samples.
        mixture: random combination of the outputs, one standard normal number each.
        activations: bytes of one sample's.
        batch_norm: of the module.
        statistics_of: samples that give the statistics.
    """
    if len(mixture) > 1 and activations * len(mixture) > LARGE:
        inputs, mixture = map_inputs(lambda tensor: tensor[:1], inputs), mixture[:1]
        sites, calls, gradients = (), (), ()
        truth = parameter_gradients(module, list(truth), inputs, mixture)
    other = torch.float32 if module.dtype == torch.float64 else torch.float64
    ratio = 2.0**-29 if module.dtype == torch.float64 else 1.0
    unit = 2.0**-24 * ratio
    by_factors = [site for site in sites if site.linear and site.positions == 1]
    covered = {name for site in by_factors for name in site.names}
    rest = [name for name, gradient in truth.items() if name not in covered and gradient is not None]
    try:
        twin = StatelessModule(module.model, dtype=other, batch_norm=batch_norm, statistics_of=statistics_of)
        leaves = {name: twin.parameters[name].detach().requires_grad_() for name in rest}
        twin.parameters |= leaves
        twin_inputs = twin.convert(inputs)
        outputs, recorder = record(twin, twin_inputs, {name: twin.parameters[name] for name in truth})
        if by_factors and signature_of(recorder.calls) != signature_of(calls):
            return SAFETY * 16 * unit
        wanted = sorted({use.call for site in by_factors for use in site.uses})
        found = torch.autograd.grad(
            outputs,
            [*edges_of([recorder.calls[index] for index in wanted]), *leaves.values()],  # type: ignore[arg-type]
            mixture.to(outputs),
            allow_unused=True,
        )
    except (TypeError, RuntimeError):  # a forward that works in one type only
        return SAFETY * 16 * unit
    twin_gradients = dict(zip(wanted, found, strict=False))
    change = size = 0.0
    for site in by_factors:
        index, samples = site.uses[0].call, len(mixture)
        twin_gradient = twin_gradients[index]
        if twin_gradient is None:
            continue
        mine = _factors(site, calls, gradients[index], samples)
        theirs = _factors(site, recorder.calls, twin_gradient, samples)
        bias = 1.0 if site.bias is not None else 0.0
        for (a, b), (c, d) in zip(mine, theirs, strict=True):
            change += float(((b - d).norm() * a.norm() + d.norm() * (a - c).norm()) ** 2 + bias * (b - d).norm() ** 2)
            size += float(d.norm() ** 2 * (c.norm() ** 2 + bias))
    for name, twin_gradient in zip(rest, found[len(wanted) :], strict=True):
        mine_gradient = truth[name]
        if mine_gradient is not None and twin_gradient is not None:
            change += float((mine_gradient.double() - twin_gradient.double()).square().sum())
            size += float(twin_gradient.double().square().sum())
    measured = (change / size) ** 0.5 if size else 0.0
    return SAFETY * max(measured * ratio, unit)


def _factors(site: Site, calls: Sequence[LayerCall], gradient: Tensor, samples: int) -> list[tuple[Tensor, Tensor]]:
    """(a, b) of every sample, in float64."""
    call = site.uses[0].call
    inputs = site_inputs(site, calls, samples).flatten(1).double()
    outer = site_gradients(site, calls, {call: gradient}, samples).flatten(1).double()
    return list(zip(inputs, outer, strict=True))
