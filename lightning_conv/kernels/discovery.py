"""Read a network on a handful of samples before the kernel: which parameters obey a layer rule, and how exact its Jacobian is.

All of it is checked numerically, so that a rule is used only where it reproduces autograd's own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_conv.evaluation import BatchNormMode, Inputs, StatelessModule, input_tensors, map_inputs, sample_count
from lightning_conv.kernels.recording import (
    LayerCall,
    SampleAxis,
    candidate_axes,
    layer_gradients,
    record,
    signature_of,
)
from lightning_conv.kernels.rounding import estimate_jacobian_error, parameter_gradients
from lightning_conv.kernels.rules import EmbeddingRule, OuterRule
from lightning_conv.kernels.sites import (
    Site,
    gradient_by_sample,
    group_calls,
    prepare,
    site_gradients,
    site_inputs,
    site_rows,
    slot_of,
)

READ_SAMPLES = 3


@dataclass(frozen=True)
class Anatomy:
    """What ``read_network`` found."""

    parameters: tuple[str, ...]  # those that were asked for
    sites: tuple[Site, ...]
    general: Mapping[str, str]  # parameters without a rule, and why
    unused: tuple[str, ...]  # parameters the outputs do not depend on
    outputs: int  # C
    first_outputs: Tensor  # of the samples it was read on
    tracked: tuple[str, ...]  # parameters whose uses were recorded
    signature: tuple[tuple[str, ...], ...]  # parameters of the recorded calls, in order
    gradient_numel: int  # numbers in B of one output and sample, all calls together
    forward_bytes: int  # that a forward with its graph takes for one sample
    reading_bytes: int  # that reading the network takes
    general_sizes: Mapping[str, int]  # elements of the parameters without a rule
    jacobian_error: float  # relative, estimated


def read_network(
    module: StatelessModule,
    names: tuple[str, ...],
    inputs: Inputs,
    *,
    batch_norm: BatchNormMode,
    statistics_of: Inputs,
    rules: bool = True,
    samples: int = READ_SAMPLES,
) -> Anatomy:
    """Find the layer rules that hold for the parameters ``names``, on the first three samples.

    A site is accepted when (1) it gives autograd's own gradient of a random combination of outputs, and (2) weighting
    the samples weights its B along one dimension, which is then where the samples are.

    Args:
        module: the network as a function.
        names: parameters to differentiate by.
        inputs: samples.
        batch_norm: of the module, for its twin in the other precision.
        statistics_of: likewise.
        rules: False: find none, everything goes the general way.
        samples: how many to read it on; all of them, where they couple.
    """
    few = map_inputs(lambda tensor: tensor[: min(samples, sample_count(inputs))], inputs)
    samples = sample_count(few)
    generator = torch.Generator().manual_seed(0)
    tracked = {name: module.parameters[name] for name in names} if rules else {}
    saved = SavedBytes(module.parameters)
    with saved:
        outputs, recorder = record(module, few, tracked)
    calls = recorder.calls
    # Independent normals v_ic have E |v^T J|^2 = |J|_F^2, for J and for its rounding error alike.
    mixture = torch.randn(outputs.shape, generator=generator).to(outputs)
    weights = torch.rand(samples, generator=generator).add_(0.5).to(outputs)
    plain = layer_gradients(outputs, mixture, calls, keep=True)
    weighted = layer_gradients(outputs, weights[:, None] * mixture, calls, keep=False)
    truth = parameter_gradients(module, names, few, mixture)
    unused = tuple(name for name in names if truth[name] is None)
    tolerance = torch.finfo(module.dtype).eps ** 0.5
    why = {name: "it is used by functions without a layer rule" for name in recorder.elsewhere}
    axes = _sample_axes(calls, plain, weighted, weights, tolerance)
    for index, call in enumerate(calls):
        if plain[index] is not None and index not in axes:
            why |= dict.fromkeys(call.names.values(), "no dimension of a layer's output holds the samples")
    allowed = set(names) - set(why) - set(unused)
    present = [outputs.new_zeros(call.shape) if p is None else p for call, p in zip(calls, plain, strict=True)]
    sites = []
    for site in group_calls(calls, axes, allowed):
        fault = _fault(site, calls, present, samples, truth, tolerance)
        if fault is None:
            sites.append(_measured(site, calls, present, samples))
        else:
            why |= dict.fromkeys(site.names, fault)
    ruled = {name for site in sites for name in site.names}
    general = {n: why.get(n, "no layer rule covers it") for n in names if n not in ruled and n not in unused}
    forward_bytes = -(-(saved.bytes + 3 * recorder.largest) // samples)
    return Anatomy(
        parameters=names,
        sites=tuple(sites),
        general=general,
        unused=unused,
        outputs=int(outputs.shape[1]),
        first_outputs=outputs.detach(),
        tracked=tuple(tracked),
        signature=signature_of(calls),
        gradient_numel=sum(call.shape.numel() for call in calls) // samples,
        forward_bytes=forward_bytes,
        reading_bytes=reading_bytes(module, names),
        general_sizes={name: module.parameters[name].numel() for name in general},
        jacobian_error=estimate_jacobian_error(
            module,
            sites,
            calls,
            present,
            truth,
            few,
            mixture,
            activations=forward_bytes,
            batch_norm=batch_norm,
            statistics_of=statistics_of,
        ),
    )


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for a backward pass, parameters apart."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.bytes = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def reading_bytes(module: StatelessModule, names: Sequence[str]) -> int:
    """Bytes that ``read_network`` takes.

    Gradients in both precisions, a copy of all parameters in the other one, and temporaries of the largest.
    """
    width = torch.finfo(module.dtype).bits // 8
    total = sum(parameter.numel() for parameter in module.parameters.values())
    asked = [module.parameters[name].numel() for name in names]
    return (12 - width) * total + 12 * sum(asked) + 24 * max(asked)


def _sample_axes(
    calls: Sequence[LayerCall],
    plain: Sequence[Tensor | None],
    weighted: Sequence[Tensor | None],
    weights: Tensor,
    tolerance: float,
) -> dict[int, SampleAxis]:
    """Where the samples are in the output of every call that reaches the outputs, as far as that can be told.

    A B of zeros tells nothing (the last steps of a sequence read backwards, of which only the first is used): such a call
    takes after another one of the same parameters and the same shape.
    """
    axes: dict[int, SampleAxis] = {}
    alike: dict[tuple[object, ...], SampleAxis] = {}
    for index, (call, p, w) in enumerate(zip(calls, plain, weighted, strict=True)):
        axis = None if p is None or w is None else _sample_axis(p, w, weights, tolerance)
        if axis is not None:
            axes[index] = alike[(*call.names.values(), call.shape)] = axis
    for index, (call, p) in enumerate(zip(calls, plain, strict=True)):
        twin = alike.get((*call.names.values(), call.shape))
        if index not in axes and twin is not None and p is not None and not bool(p.any()):
            axes[index] = twin
    return axes


def _sample_axis(plain: Tensor, weighted: Tensor, weights: Tensor, tolerance: float) -> SampleAxis | None:
    """The place along which weighting the samples has weighted B; None where there is none or B is zero."""
    samples = len(weights)
    if not bool(plain.any()):
        return None
    for axis in candidate_axes(plain.shape, samples):
        front, after = (axis.to_front(value, samples) for value in (plain, weighted))
        if _close(after, front * weights.view(-1, *[1] * (front.ndim - 1)), tolerance):
            return axis
    return None


def _fault(
    site: Site,
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor],
    samples: int,
    truth: Mapping[str, Tensor | None],
    tolerance: float,
) -> str | None:
    """Why the site's rule may not be used; None where it gives autograd's gradient."""
    for name in site.names:
        expected = truth[name]
        assert expected is not None
        try:
            found, expected = _compared(site, name, calls, gradients, samples, expected)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            return f"its layer rule failed ({type(error).__name__}: {error})"
        if found.numel() != expected.numel() or not _close(found.reshape(expected.shape), expected, tolerance):
            return "its layer rule does not give autograd's gradient"
    return None


def _compared(
    site: Site, name: str, calls: Sequence[LayerCall], gradients: Sequence[Tensor], samples: int, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient by one parameter, summed over the samples, from the rule and from autograd.

    A linear weight may have millions of elements: both are multiplied by one random vector, which tells two matrices
    apart with probability one and saves forming the first.
    """
    first = calls[site.uses[0].call]
    if slot_of(first, name) == ["weight"] and site.linear:
        vector = torch.randn(truth.shape[1], generator=torch.Generator().manual_seed(1)).to(truth)
        inputs = site_inputs(site, calls, samples).flatten(0, 2)  # (n R, in)
        outer = site_gradients(site, calls, gradients, samples).flatten(0, 2)
        return outer.T @ (inputs @ vector), truth @ vector
    return site_rows(prepare(site, calls, samples), name, gradients, samples).sum(0), truth


def _measured(site: Site, calls: Sequence[LayerCall], gradients: Sequence[Tensor], samples: int) -> Site:
    """The site with the sizes of its outer products, where it is one."""
    rules = [calls[use.call].rule for use in site.uses]
    slots = [slot_of(calls[use.call], site.weight) if site.weight else [] for use in site.uses]
    if all(isinstance(rule, OuterRule) and slot == ["weight"] for rule, slot in zip(rules, slots, strict=True)):
        inputs = site_inputs(site, calls, samples)
        outer = site_gradients(site, calls, gradients, samples)
        _, positions, groups, width = inputs.shape
        constant = all(rule.bias_is_constant_input for rule in rules if isinstance(rule, OuterRule))
        return replace(
            site,
            positions=positions,
            groups=groups,
            inputs=width,
            gradients=outer.shape[-1],
            bias_in_product=constant,
            input_numel=sum(t.numel() for use in site.uses for t in calls[use.call].sampled.values()) // samples,
        )
    if all(isinstance(rule, EmbeddingRule) for rule in rules):
        moved = [gradient_by_sample(gradients[use.call], use.axis, samples) for use in site.uses]
        width = moved[0].shape[-1]
        return replace(site, positions=sum(m[0].numel() for m in moved) // width, gradients=width, tokens=True)
    return site


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
            "added, so samples couple or the forward is random; remove what mixes samples (batch-wide attention) or what is random in "
            'evaluation mode, or ask for batch_norm="batch", the kernel of the whole batch'
        )


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def require_float_inputs(inputs: Inputs) -> None:
    """Refuse empty or non-finite inputs before anything is computed.

    Raises:
        ValueError: an input holds NaN or infinity.
    """
    for position, tensor in enumerate(input_tensors(inputs)):
        # The sum of finite numbers may overflow, so it acquits only.
        suspect = tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum()))
        if suspect and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"inputs: tensor {position} of shape {tuple(tensor.shape)} holds NaN or infinity; clean the samples"
            )
