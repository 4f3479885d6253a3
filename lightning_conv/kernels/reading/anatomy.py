"""``Anatomy``: what ``read_network`` finds in a network on a few samples, such as the layers that obey a rule.

Everything is checked numerically: a rule is used only where it reproduces the gradient of autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from lightning_conv.kernels.reading.first_forward import UNWATCHED, first_forward
from lightning_conv.kernels.reading.jacobian_error import (
    Factored,
    error_again,
    estimate_jacobian_error,
    parameter_gradients,
)
from lightning_conv.kernels.reading.memory import peak_bytes
from lightning_conv.kernels.reading.moved_weights import read_at_moved_weights, silent_calls
from lightning_conv.kernels.reading.recording import layer_gradients, signature_of
from lightning_conv.kernels.reading.rule_check import fault_of, measured
from lightning_conv.kernels.reading.sample_axis import sample_axes
from lightning_conv.kernels.reading.samples import channels_last
from lightning_conv.kernels.reading.sites import Site, group_calls
from lightning_conv.kernels.reading.terms import size_of_products, size_of_terms
from lightning_conv.kernels.reading.timing import AloneTiming, time_alone
from lightning_conv.machine.clock import now
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, input_tensors, sample_count, spread, take
from lightning_conv.networks.narrowing import Narrowing, coarser

READ_SAMPLES = 3
"""Samples on which a network is read, unless its samples couple."""

LARGE = 8 * 2**20
"""Bytes of activations from which the gradients of one sample are compared only: in float64 they take as long as a
small kernel."""

LAYOUT_ERRORS = (RuntimeError, ValueError, AssertionError)
"""Errors that a network raises for strides that it was not written for, through ``view`` or a check of its own."""


@dataclass(frozen=True)
class Anatomy:
    """What ``read_network`` finds in a network."""

    parameters: tuple[str, ...]  # those to differentiate by
    sites: tuple[Site, ...]
    general: Mapping[str, str]  # parameters without a rule, with the reason
    unused: tuple[str, ...]  # parameters on which the outputs of the samples that were read do not depend
    outputs: int  # C
    level: float  # the size of the terms that add up to an output (``reading.terms``)
    tracked: tuple[str, ...]  # parameters whose uses were recorded
    signature: tuple[tuple[str, ...], ...]  # parameters of each recorded call, in order
    gradient_numel: int  # numbers in B for one output and sample, all calls together
    forward_bytes: int  # bytes of a forward with its graph, for one sample
    reading_bytes: int  # peak bytes of reading the network
    general_sizes: Mapping[str, int]  # elements of the parameters without a rule
    jacobian_error: float  # relative, estimated
    narrowing: Narrowing | None  # where a copy in float64 casts to a narrower type
    coarse: torch.dtype | None  # narrowest type in which the forward computes, if it is narrower than the evaluation's
    channels_last: bool  # whether images are passed with their channels innermost rather than as they are
    forward_seconds: float = field(default=0.0, compare=False)  # of one sample, with its graph, as it was timed
    backward_seconds: float = field(default=0.0, compare=False)  # of one combination of the outputs of one sample
    alone: AloneTiming | None = field(default=None, compare=False)  # of a sample by itself, where the network is large

    @property
    def is_large(self) -> bool:
        """Whether a pass takes long enough for what was timed to be its duration."""
        return self.forward_bytes * READ_SAMPLES > LARGE

    def arranged(self, inputs: Inputs) -> Inputs:
        """Return ``inputs`` in the layout in which the network was read."""
        return channels_last(inputs) if self.channels_last else inputs

    def with_general(self, sizes: Mapping[str, int], reason: str) -> Anatomy:
        """Return an anatomy in which these unused parameters, given with their sizes, belong to the general engine."""
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
    by_gradients: bool = False,
) -> Anatomy:
    """Find the layer rules that apply to the parameters ``names``, on a few samples.

    A layer with its parameters (a ``Site``) is accepted if

    1. its rule reproduces the gradient of autograd for a random combination of outputs, and
    2. weighting the samples weights the output gradients B along one dimension, which is then where the samples are.

    Images are passed with their channels innermost. A forward that does not accept this layout (``x.view(len(x), -1)``)
    gets the layout of the caller, now and in the passes.

    Args:
        module: the network as a function.
        names: parameters to differentiate by.
        inputs: the samples of the kernel.
        rules: whether to look for layer rules; False: all parameters belong to the general engine.
        samples: number of samples to read; all of them, where samples couple.
        by_gradients: whether the rounding is measured on whole gradients, as ``rounded_again`` does, so that both give the same number.

    Raises:
        OutOfMemoryError: the device is out of memory.
    """
    few = spread(inputs, samples)
    if rules and any(a is not b for a, b in zip(*map(input_tensors, (channels_last(few), few)), strict=True)):
        try:
            return _read(module, names, few, rules=True, in_channels_last=True, by_gradients=by_gradients)
        except torch.OutOfMemoryError:
            raise
        except LAYOUT_ERRORS:  # an error with another cause is raised again below
            pass
    return _read(module, names, few, rules=rules, in_channels_last=False, by_gradients=by_gradients)


def rounded_again(
    anatomy: Anatomy, module: StatelessModule, inputs: Inputs, share: Callable[[int], slice] | None = None
) -> Anatomy:
    """Return what was found in a network, with the rounding of its Jacobian as it is at the weights of now.

    Args:
        anatomy: what was found at other weights.
        module: the network.
        inputs: the samples of the kernel.
        share: which of the chosen samples are looked at here, by their number, where several processes look, whose largest result
            counts; None: all.

    Cost: two gradients of at most three samples, one of them in the other precision.
    """
    samples = sample_count(inputs) if module.batch_norm == "batch" else READ_SAMPLES
    few = spread(inputs, samples)
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(sample_count(few), anatomy.outputs, generator=generator)
    mixture = mixture.to(next(iter(module.parameters.values())))
    if module.batch_norm != "batch" and anatomy.forward_bytes * sample_count(few) > LARGE:
        few, mixture = take(few, slice(1)), mixture[:1]
    mine = slice(None) if share is None else share(sample_count(few))
    if mine != slice(None) and mine.start < mine.stop:  # with fewer samples than processes some look at all of them
        few, mixture = take(few, mine), mixture[mine]
    truth = parameter_gradients(module, anatomy.parameters, few, mixture)
    return replace(anatomy, jacobian_error=error_again(module, few, mixture, truth, anatomy.narrowing))


def _read(
    module: StatelessModule,
    names: tuple[str, ...],
    few: Inputs,
    *,
    rules: bool,
    in_channels_last: bool,
    by_gradients: bool,
) -> Anatomy:
    """Read the network on all samples of ``few``.

    The layers are read in the layout that ``in_channels_last`` says. The gradients of autograd, which serve for
    comparison, use the layout of the caller, since a convolution in another layout takes more memory for them.
    """
    samples = sample_count(few)
    generator = torch.Generator().manual_seed(0)
    given = channels_last(few) if in_channels_last else few
    first = first_forward(module, given, {name: module.parameters[name] for name in names} if rules else {})
    outputs, recorder, forward_bytes, forward_seconds = first.outputs, first.recorder, first.bytes, first.seconds
    calls, tracked, lowered = recorder.calls, tuple(first.tracked), recorder.lowered
    # Independent standard normal v_ic give E |v^T J|^2 = |J|_F^2, for J and for its rounding error alike.
    mixture = torch.randn(outputs.shape, generator=generator).to(outputs)
    weights = torch.rand(samples, generator=generator).add_(0.5).to(outputs)
    plain = layer_gradients(outputs, mixture, calls, keep=True)
    tolerance = torch.finfo(module.dtype).eps ** 0.5
    start = now(module.device)
    weighted = layer_gradients(outputs, weights[:, None] * mixture, calls, keep=False)
    backward_seconds = (now(module.device) - start) / samples
    axes = sample_axes(calls, plain, weighted, weights, tolerance)
    del weighted
    # For a large network the gradients of one sample are enough, unless samples couple.
    checked = 1 if module.batch_norm != "batch" and forward_bytes * samples > LARGE else samples
    probe, combination = take(few, slice(checked)), mixture[:checked]
    moved = None
    if silent := silent_calls(plain, axes):
        moved = read_at_moved_weights(
            module,
            names,
            first.tracked,
            given,
            probe,
            mixture=mixture,
            combination=combination,
            weights=weights,
            tolerance=tolerance,
            signature=signature_of(calls),
        )
    if moved is not None:
        axes |= {index: axis for index, axis in moved.axes.items() if index in silent}
    start = now(module.device)
    truth = parameter_gradients(module, names, probe, combination)
    gradient_seconds = now(module.device) - start
    unused = tuple(name for name in names if truth[name] is None)
    why = dict.fromkeys(names, UNWATCHED) if rules and not tracked else {}
    why |= dict.fromkeys(recorder.elsewhere, "it is used by functions without a layer rule")
    for index, call in enumerate(calls):
        if plain[index] is not None and index not in axes:
            why |= dict.fromkeys(call.names.values(), "no dimension of a layer's output contains the samples")
    allowed = set(names) - set(why) - set(unused)
    present = [outputs.new_zeros(call.shape) if p is None else p for call, p in zip(calls, plain, strict=True)]
    sites = []
    for site in group_calls(calls, axes, allowed):
        if moved is not None and any(use.call in silent for use in site.uses):
            fault = fault_of(site, moved.calls, moved.gradients, samples, moved.truth, tolerance, checked)
        else:
            fault = fault_of(site, calls, present, samples, truth, tolerance, checked)
        if fault is None:
            sites.append(measured(site, calls, present, samples))
        else:
            why |= dict.fromkeys(site.names, fault)
    ruled = {name for site in sites for name in site.names}
    general = {n: why.get(n, "no layer rule covers it") for n in names if n not in ruled and n not in unused}
    signature, classes = signature_of(calls), int(outputs.shape[1])
    level = size_of_terms(module, truth, combination) + size_of_products(calls, plain, mixture)
    gradient_numel = sum(call.shape.numel() for call in calls) // samples
    recorded = first.tracked
    if checked < samples:  # activations as large as these are freed as soon as they are not needed
        del first, outputs, plain, present, recorder, calls, moved
    factored = None if by_gradients or checked < samples else Factored(sites, calls, present)
    start = now(module.device)
    error, narrowing = estimate_jacobian_error(module, probe, combination, truth, by_factors=factored)
    compared_seconds, alone = now(module.device) - start, None
    if checked < samples:
        sample = channels_last(probe) if in_channels_last else probe
        alone = time_alone(
            module, sample, combination, recorded, gradient=gradient_seconds, difference=compared_seconds
        )
    return Anatomy(
        parameters=names,
        sites=tuple(sites),
        general=general,
        unused=unused,
        outputs=classes,
        level=level,
        tracked=tracked,
        signature=signature,
        gradient_numel=gradient_numel,
        forward_bytes=forward_bytes,
        reading_bytes=peak_bytes(module, names, samples, checked, forward_bytes, gradient_numel),
        general_sizes={name: module.parameters[name].numel() for name in general},
        jacobian_error=error,
        narrowing=narrowing,
        coarse=coarser(lowered, None if narrowing is None else narrowing.dtype),
        channels_last=in_channels_last and bool(sites),
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
        alone=alone,
    )
