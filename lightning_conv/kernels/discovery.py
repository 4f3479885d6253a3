"""Read a network on a handful of samples before the kernel: which parameters obey a layer rule, and how exact its Jacobian is.

All of it is checked numerically, so that a rule is used only where it reproduces autograd's own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.evaluation import BatchNormMode, Inputs, StatelessModule, input_tensors, map_inputs, sample_count
from lightning_conv.kernels.structured import LinearCall, LinearCalls, LinearSite, linear_factors, linear_sites

READ_SAMPLES = 3
SAFETY = 4.0


@dataclass(frozen=True)
class Anatomy:
    """What ``read_network`` found."""

    sites: tuple[LinearSite, ...]
    general: tuple[str, ...]  # parameters without a rule
    unused: tuple[str, ...]  # parameters the outputs do not depend on
    outputs: int  # C
    call_count: int
    bytes_per_sample: int  # of A and of one output's B, all sites together
    input_bytes: int  # of A alone
    jacobian_error: float  # relative, estimated


def record(module: StatelessModule, inputs: Inputs) -> tuple[Tensor, list[LinearCall], set[str]]:
    """One forward with the linear layers recorded: outputs (n, C), the calls, and parameters used elsewhere."""
    with LinearCalls(module.parameters) as recorder:
        outputs = module.outputs({}, inputs)
    return outputs, recorder.calls, recorder.elsewhere


def layer_gradients(outputs: Tensor, cotangent: Tensor, calls: list[LinearCall], *, keep: bool) -> list[Tensor]:
    """B of every call for the scalar sum(cotangent * outputs); zeros where a layer does not reach it."""
    if not calls or not outputs.requires_grad:
        return [torch.zeros_like(call.probe) for call in calls]
    found = torch.autograd.grad(
        (outputs * cotangent).sum(), [call.probe for call in calls], retain_graph=keep, allow_unused=True
    )
    return [torch.zeros_like(c.probe) if g is None else g for c, g in zip(calls, found, strict=True)]


def read_network(
    module: StatelessModule, names: tuple[str, ...], inputs: Inputs, *, batch_norm: BatchNormMode, statistics_of: Inputs
) -> Anatomy:
    """Find the layer rules that hold for the parameters ``names``, on the first three samples.

    A site is accepted when (1) its recorded A and B give autograd's own parameter gradient and (2) weighting the
    samples weights its B along dimension 0, which is false where that dimension is not the sample.
    """
    few = map_inputs(lambda tensor: tensor[: min(READ_SAMPLES, sample_count(inputs))], inputs)
    samples = sample_count(few)
    generator = torch.Generator().manual_seed(0)
    outputs, calls, elsewhere = record(module, few)
    # Independent normals v_ic have E |v^T J|^2 = |J|_F^2, for J and for its rounding error alike.
    mixture = torch.randn(outputs.shape, generator=generator).to(outputs)
    weights = torch.rand(samples, generator=generator).add_(0.5).to(outputs)
    plain = layer_gradients(outputs, mixture, calls, keep=True)
    weighted = layer_gradients(outputs, weights[:, None] * mixture, calls, keep=False)

    truth = _parameter_gradients(module, names, few, mixture)
    unused = tuple(name for name in names if truth[name] is None)
    tolerance = torch.finfo(module.dtype).eps ** 0.5
    allowed = set(names) - elsewhere - set(unused)
    by_sample = [_follows_samples(p, w, weights, tolerance) for p, w in zip(plain, weighted, strict=True)]
    for call, follows in zip(calls, by_sample, strict=True):
        if not follows or call.inputs.shape[0] != samples:
            allowed -= {call.weight, call.bias}
    sites = []
    for site in linear_sites(calls, allowed):
        factor = linear_factors(calls, [g[:, None] for g in plain], [site])[0]
        weight = torch.einsum("tkro,tri->oi", factor.gradients, factor.inputs)
        bias = factor.gradients.sum((0, 1, 2))
        if _agrees(weight, site.weight, truth, tolerance) and _agrees(bias, site.bias, truth, tolerance):
            sites.append(site)
    ruled = {name for site in sites for name in (site.weight, site.bias)}
    used = {k for site in sites for k in site.calls}
    input_numel = sum(calls[k].inputs[0].numel() for k in used)
    output_numel = sum(calls[k].probe[0].numel() for k in used)
    width = torch.finfo(module.dtype).bits // 8
    return Anatomy(
        sites=tuple(sites),
        general=tuple(name for name in names if name not in ruled and name not in unused),
        unused=unused,
        outputs=int(outputs.shape[1]),
        call_count=len(calls),
        bytes_per_sample=output_numel * width,
        input_bytes=(input_numel + output_numel) * width,
        jacobian_error=_jacobian_error(module, truth, names, few, mixture, batch_norm, statistics_of),
    )


def check_samples_do_not_couple(few: Tensor, whole: Tensor) -> None:
    """Refuse a network whose outputs of the first samples change with the rest of the batch.

    Raises:
        ValueError: they do; the kernel of one sample pair would not be defined.
    """
    part = whole[: few.shape[0]]
    scale = max(float(whole.abs().max()), torch.finfo(few.dtype).tiny)
    change = float((part - few).abs().max()) / scale
    if change > torch.finfo(few.dtype).eps ** 0.5:
        raise ValueError(
            f"model: the outputs of the first {few.shape[0]} samples change by {change:.1e} (relative) when the rest of the batch is "
            "added, so samples couple or the forward is random; remove what mixes samples (batch statistics, batch-wide attention) "
            "or what is random in evaluation mode"
        )


def _follows_samples(plain: Tensor, weighted: Tensor, weights: Tensor, tolerance: float) -> bool:
    if plain.shape[0] != weights.shape[0]:
        return False
    expected = plain * weights.view(-1, *[1] * (plain.ndim - 1))
    return _close(weighted, expected, tolerance)


def _agrees(found: Tensor, name: str | None, truth: Mapping[str, Tensor | None], tolerance: float) -> bool:
    expected = truth.get(name) if name is not None else None
    return name is None or (expected is not None and _close(found, expected, tolerance))


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def _parameter_gradients(
    module: StatelessModule, names: tuple[str, ...], inputs: Inputs, mixture: Tensor
) -> dict[str, Tensor | None]:
    leaves = {name: module.parameters[name].detach().requires_grad_() for name in names}
    outputs = module.outputs(leaves, inputs)
    if not outputs.requires_grad:
        return dict.fromkeys(names)
    found = torch.autograd.grad((outputs * mixture.to(outputs)).sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(names, found, strict=True))


def _jacobian_error(
    module: StatelessModule,
    gradients: Mapping[str, Tensor | None],
    names: tuple[str, ...],
    inputs: Inputs,
    mixture: Tensor,
    batch_norm: BatchNormMode,
    statistics_of: Inputs,
) -> float:
    """Estimated relative rounding error |dJ|_F / |J|_F of the Jacobian in the module's precision, with a safety factor of 4.

    Measured: the same random combination of Jacobian rows in float32 and in float64. For a float64 evaluation the measured
    float32 figure is scaled by 2^-29, the ratio of the unit roundoffs. An estimate, not a bound.
    """
    other = torch.float32 if module.dtype == torch.float64 else torch.float64
    ratio = 2.0**-29 if module.dtype == torch.float64 else 1.0
    unit = 2.0**-24 * ratio
    try:
        twin = StatelessModule(module.model, dtype=other, batch_norm=batch_norm, statistics_of=statistics_of)
        twins = _parameter_gradients(twin, names, twin.convert(inputs), mixture)
    except (TypeError, RuntimeError):  # a forward that works in one type only
        return SAFETY * 16 * unit
    pairs = [(gradients[n], twins[n]) for n in names]
    change = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs if a is not None and b is not None)
    size = sum(float(b.double().square().sum()) for _, b in pairs if b is not None)
    measured = (change / size) ** 0.5 if size else 0.0
    return SAFETY * max(measured * ratio, unit)


def require_float_inputs(inputs: Inputs) -> None:
    """Refuse empty or non-finite inputs before anything is computed.

    Raises:
        ValueError: an input holds NaN or infinity.
    """
    for position, tensor in enumerate(input_tensors(inputs)):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"inputs: tensor {position} of shape {tuple(tensor.shape)} holds NaN or infinity; clean the samples"
            )
