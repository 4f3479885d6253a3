"""Read a network on a handful of samples before the kernel: which parameters obey a layer rule, and how exact its Jacobian is.

All of it is checked numerically, so that a rule is used only where it reproduces autograd's own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_conv.kernels.reading.first_forward import UNWATCHED, first_forward
from lightning_conv.kernels.reading.jacobian_error import Factored, estimate_jacobian_error, parameter_gradients
from lightning_conv.kernels.reading.memory import peak_bytes
from lightning_conv.kernels.reading.recording import LayerCall, layer_gradients, signature_of
from lightning_conv.kernels.reading.sample_axis import close, sample_axes
from lightning_conv.kernels.reading.samples import channels_last
from lightning_conv.kernels.reading.sites import (
    Site,
    gradient_by_sample,
    group_calls,
    prepare,
    site_gradients,
    site_inputs,
    site_rows,
    slot_of,
)
from lightning_conv.kernels.rules import EmbeddingRule, OuterRule
from lightning_conv.networks.evaluation import Inputs, StatelessModule, input_tensors, sample_count, take

READ_SAMPLES = 3

LARGE = 8 * 2**20
"""Bytes of activations from which on one sample's gradients are looked at: in float64 they take as long as a small kernel."""

LAYOUT_ERRORS = (RuntimeError, ValueError, AssertionError)
"""What a network raises on strides that it was not written for: by ``view``, or a check of its own."""


@dataclass(frozen=True)
class Anatomy:
    """What ``read_network`` found."""

    parameters: tuple[str, ...]  # those that were asked for
    sites: tuple[Site, ...]
    general: Mapping[str, str]  # parameters without a rule, and why
    unused: tuple[str, ...]  # parameters that the outputs of the samples looked at do not depend on
    outputs: int  # C
    first_outputs: Tensor  # of the samples it was read on
    level: float  # sum of |du/dtheta||theta| over the parameters: the size of what is added up to make an output
    tracked: tuple[str, ...]  # parameters whose uses were recorded
    signature: tuple[tuple[str, ...], ...]  # parameters of the recorded calls, in order
    gradient_numel: int  # numbers in B of one output and sample, all calls together
    forward_bytes: int  # that a forward with its graph takes for one sample
    reading_bytes: int  # that reading the network takes
    general_sizes: Mapping[str, int]  # elements of the parameters without a rule
    jacobian_error: float  # relative, estimated
    channels_last: bool  # whether images are given to the layers with their channels innermost; else as they are

    def arranged(self, inputs: Inputs) -> Inputs:
        """``inputs`` in the layout that the network was read in."""
        return channels_last(inputs) if self.channels_last else inputs

    def with_general(self, sizes: Mapping[str, int], reason: str) -> Anatomy:
        """Some of the unused parameters, given by their elements, left to the general engine after all."""
        return replace(
            self,
            unused=tuple(name for name in self.unused if name not in sizes),
            general={**self.general, **dict.fromkeys(sizes, reason)},
            general_sizes={**self.general_sizes, **sizes},
        )


def read_network(
    module: StatelessModule,
    names: tuple[str, ...],
    inputs: Inputs,
    *,
    rules: bool = True,
    samples: int = READ_SAMPLES,
) -> Anatomy:
    """Find the layer rules that hold for the parameters ``names``, on the first three samples.

    A site is accepted when (1) it gives autograd's own gradient of a random combination of outputs, and (2) weighting
    the samples weights its B along one dimension, which is then where the samples are. Images are given with their channels
    innermost; a forward that cannot take them so (``x.view(len(x), -1)``) gets what the caller gave, then and later.

    Args:
        module: the network as a function.
        names: parameters to differentiate by.
        inputs: samples.
        rules: False: find none, everything goes the general way.
        samples: how many to read it on; all of them, where they couple.

    Raises:
        OutOfMemoryError: of the device.
    """
    few = take(inputs, slice(0, samples))
    if rules and any(a is not b for a, b in zip(*map(input_tensors, (channels_last(few), few)), strict=True)):
        try:
            return _read(module, names, few, rules=True, in_channels_last=True)
        except torch.OutOfMemoryError:
            raise
        except LAYOUT_ERRORS:  # where it was another reason, it comes again
            pass
    return _read(module, names, few, rules=rules, in_channels_last=False)


def _read(
    module: StatelessModule, names: tuple[str, ...], few: Inputs, *, rules: bool, in_channels_last: bool
) -> Anatomy:
    """Read the network on all of ``few``: the layers in the layout that is said, autograd's own gradients in the caller's.

    Those are for comparison, and a convolution in another layout takes more memory for them.
    """
    samples = sample_count(few)
    generator = torch.Generator().manual_seed(0)
    given = channels_last(few) if in_channels_last else few
    first = first_forward(module, given, {name: module.parameters[name] for name in names} if rules else {})
    outputs, recorder, forward_bytes = first.outputs, first.recorder, first.bytes
    calls, tracked = recorder.calls, tuple(first.tracked)
    # Independent normals v_ic have E |v^T J|^2 = |J|_F^2, for J and for its rounding error alike.
    mixture = torch.randn(outputs.shape, generator=generator).to(outputs)
    weights = torch.rand(samples, generator=generator).add_(0.5).to(outputs)
    plain = layer_gradients(outputs, mixture, calls, keep=True)
    tolerance = torch.finfo(module.dtype).eps ** 0.5
    axes = sample_axes(
        calls, plain, layer_gradients(outputs, weights[:, None] * mixture, calls, keep=False), weights, tolerance
    )
    # The parameters' gradients of one sample tell enough of a network that is large, unless samples couple.
    checked = 1 if module.batch_norm != "batch" and forward_bytes * samples > LARGE else samples
    probe, combination = take(few, slice(checked)), mixture[:checked]
    truth = parameter_gradients(module, names, probe, combination)
    unused = tuple(name for name in names if truth[name] is None)
    why = dict.fromkeys(names, UNWATCHED) if rules and not tracked else {}
    why |= dict.fromkeys(recorder.elsewhere, "it is used by functions without a layer rule")
    for index, call in enumerate(calls):
        if plain[index] is not None and index not in axes:
            why |= dict.fromkeys(call.names.values(), "no dimension of a layer's output holds the samples")
    allowed = set(names) - set(why) - set(unused)
    present = [outputs.new_zeros(call.shape) if p is None else p for call, p in zip(calls, plain, strict=True)]
    sites = []
    for site in group_calls(calls, axes, allowed):
        fault = _fault(site, calls, present, samples, truth, tolerance, checked)
        if fault is None:
            sites.append(_measured(site, calls, present, samples))
        else:
            why |= dict.fromkeys(site.names, fault)
    ruled = {name for site in sites for name in site.names}
    general = {n: why.get(n, "no layer rule covers it") for n in names if n not in ruled and n not in unused}
    signature, first_outputs = signature_of(calls), outputs.detach()
    sizes = [float(g.norm() * module.parameters[name].norm()) for name, g in truth.items() if g is not None]
    gradient_numel = sum(call.shape.numel() for call in calls) // samples
    if checked < samples:  # with activations as large as these, nothing is kept that is not needed any more
        del first, outputs, plain, present, recorder, calls
    error = estimate_jacobian_error(
        module,
        probe,
        combination,
        truth,
        by_factors=Factored(sites, calls, present) if checked == samples else None,
    )
    return Anatomy(
        parameters=names,
        sites=tuple(sites),
        general=general,
        unused=unused,
        outputs=int(first_outputs.shape[1]),
        first_outputs=first_outputs,
        level=sum(sizes) / float(combination.norm()),
        tracked=tracked,
        signature=signature,
        gradient_numel=gradient_numel,
        forward_bytes=forward_bytes,
        reading_bytes=peak_bytes(module, names, samples, checked, forward_bytes, gradient_numel),
        general_sizes={name: module.parameters[name].numel() for name in general},
        jacobian_error=error,
        channels_last=in_channels_last and bool(sites),
    )


def _fault(
    site: Site,
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor],
    samples: int,
    truth: Mapping[str, Tensor | None],
    tolerance: float,
    checked: int,
) -> str | None:
    """Why the site's rule may not be used; None where it gives autograd's gradient of the first ``checked`` samples."""
    for name in site.names:
        expected = truth[name]
        assert expected is not None
        try:
            found, expected = _compared(site, name, calls, gradients, samples, expected, checked)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            return f"its layer rule failed ({type(error).__name__}: {error})"
        if found.numel() != expected.numel() or not close(found.reshape(expected.shape), expected, tolerance):
            return "its layer rule does not give autograd's gradient"
    return None


def _compared(
    site: Site,
    name: str,
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor],
    samples: int,
    truth: Tensor,
    checked: int,
) -> tuple[Tensor, Tensor]:
    """The gradient by one parameter, summed over the first ``checked`` samples, from the rule and from autograd.

    A linear weight may have millions of elements: both are multiplied by one random vector, which tells two matrices
    apart with probability one and saves forming the first.
    """
    first = calls[site.uses[0].call]
    if slot_of(first, name) == ["weight"] and site.linear:
        vector = torch.randn(truth.shape[1], generator=torch.Generator().manual_seed(1)).to(truth)
        inputs = site_inputs(site, calls, samples)[:checked].flatten(0, 2)  # (n R, in)
        outer = site_gradients(site, calls, gradients, samples)[:checked].flatten(0, 2)
        return outer.T @ (inputs @ vector), truth @ vector
    return site_rows(prepare(site, calls, samples), name, gradients, samples)[:checked].sum(0), truth


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
