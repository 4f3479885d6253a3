"""``read_sharded``: what is found in a sharded module on a few samples, without all of its gradients at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_conv.kernels.reading.anatomy import READ_SAMPLES, Anatomy
from lightning_conv.kernels.reading.recording import layer_gradients, record, signature_of
from lightning_conv.kernels.reading.rule_check import measured
from lightning_conv.kernels.reading.sample_axis import sample_axes
from lightning_conv.kernels.reading.sites import Site, group_calls
from lightning_conv.kernels.sharded.module import ShardedModule, ShardedRecorder
from lightning_conv.kernels.sharded.rounding import rounding_of
from lightning_conv.kernels.sharded.rule_check import CheckedRecorder
from lightning_conv.machine.clock import now
from lightning_conv.machine.memory import blocks
from lightning_conv.networks.inputs import Inputs, sample_count, spread, take
from lightning_conv.networks.sharded import agreed

NO_SAMPLES = "has a layer whose outputs show no samples (samples that couple, or no gradient at these weights)"

ROWS = 16
"""Samples that pass through the network at once where only the uses of a few parameters are looked for."""


def read_sharded(module: ShardedModule, names: tuple[str, ...], inputs: Inputs) -> Anatomy:
    """Find the layer rules of the parameters ``names`` as ``read_network`` does, where no process has all of them.

    Each rule is compared with the gradient of autograd, of one use of a parameter at a time.

    Args:
        module: the network, inside ``undisturbed`` and ``as_found``.
        names: parameters to differentiate by.
        inputs: the samples of the kernel.

    Raises:
        ValueError: a parameter has no layer rule.

    Cost: a forward of three samples with three backward passes, and two of each for the rounding.
    """
    return rounded_again(_read(module, names, spread(inputs, READ_SAMPLES)), module, inputs)


def _read(module: ShardedModule, names: tuple[str, ...], few: Inputs) -> Anatomy:
    """Return what is found on a few samples, but for the rounding."""
    samples = sample_count(few)
    generator = torch.Generator().manual_seed(0)
    start = now(module.device)
    recorder = CheckedRecorder(module, {name: module.parameters[name] for name in names})
    with recorder:
        outputs = module.outputs({}, few)
    forward_seconds = (now(module.device) - start) / samples
    calls = recorder.calls
    mixture = torch.randn(outputs.shape, generator=generator).to(outputs)
    weights = torch.rand(samples, generator=generator).add_(0.5).to(outputs)
    plain = layer_gradients(outputs, mixture, calls, keep=True)
    tolerance = torch.finfo(module.dtype).eps ** 0.5
    start = now(module.device)
    weighted = layer_gradients(outputs, weights[:, None] * mixture, calls, keep=True)
    backward_seconds = (now(module.device) - start) / samples
    axes = agreed(module.model, sample_axes(calls, plain, weighted, weights, tolerance))
    del weighted
    why = dict.fromkeys(recorder.elsewhere | recorder.hidden(outputs), "is used in a way that no layer rule covers")
    for index, call in enumerate(calls):
        if plain[index] is not None and index not in axes:
            why |= dict.fromkeys(call.names.values(), NO_SAMPLES)
    present = [outputs.new_zeros(call.shape) if p is None else p for call, p in zip(calls, plain, strict=True)]
    recorder.compare(outputs, mixture, present, axes, samples, tolerance)
    _require_rules(names, agreed(module.model, {**recorder.faults, **why}))
    sites = [measured(site, calls, present, samples) for site in group_calls(calls, axes, set(names))]
    width = torch.finfo(module.dtype).bits // 8
    numbers = sum(sum(t.numel() for t in call.sampled.values()) + call.shape.numel() for call in calls)
    forward_bytes = -(-(2 * width * numbers + 3 * recorder.largest) // samples)
    gradient_numel = sum(call.shape.numel() for call in calls) // samples
    return Anatomy(
        parameters=names,
        sites=tuple(sites),
        general={},
        unused=tuple(name for name in names if name not in recorder.arrived),
        outputs=int(outputs.shape[1]),
        level=0.0,
        tracked=names,
        signature=signature_of(calls),
        gradient_numel=gradient_numel,
        forward_bytes=forward_bytes,
        reading_bytes=samples * (forward_bytes + 2 * width * gradient_numel) + 3 * width * _largest(module, sites),
        general_sizes={},
        jacobian_error=0.0,
        narrowing=None,
        coarse=None,
        channels_last=False,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
    )


def rounded_again(anatomy: Anatomy, module: ShardedModule, inputs: Inputs) -> Anatomy:
    """Return what was found in a network, with the rounding of its Jacobian as it is at the weights of now.

    Args:
        anatomy: what was found at other weights.
        module: the network.
        inputs: the samples of the kernel.
    """
    few = spread(inputs, READ_SAMPLES)
    samples = sample_count(few)
    mixture = torch.randn(samples, anatomy.outputs, generator=torch.Generator().manual_seed(0))
    mixture = mixture.to(module.device, module.dtype)
    error = rounding_of(module, anatomy.tracked, anatomy.sites, few, mixture, samples)
    return replace(anatomy, jacobian_error=error)


def require_unreached(anatomy: Anatomy, module: ShardedModule, inputs: Inputs) -> None:
    """Refuse samples that reach a parameter which the first ones did not, since its rule was not compared.

    Args:
        anatomy: what was found on the first samples.
        module: the network.
        inputs: all samples.

    Raises:
        ValueError: there is such a parameter.

    Cost: nothing if all parameters are used; otherwise a forward and a backward pass of all samples.
    """
    tracked = {name: module.parameters[name] for name in anatomy.tracked}
    for rows in blocks(sample_count(inputs), ROWS) if anatomy.unused else ():
        outputs, recorder = record(module, take(inputs, rows), tracked)
        assert isinstance(recorder, ShardedRecorder)
        late = _reached(outputs, recorder, anatomy.unused)
        _require_rules(anatomy.unused, dict.fromkeys(late, "is reached by some samples and not by the first ones"))


def _require_rules(names: Sequence[str], why: Mapping[str, str]) -> None:
    without = [name for name in names if name in why]
    if without:
        raise ValueError(
            f"model: {without[0]!r} {why[without[0]]}, and its per-sample Jacobian would need all of the sharded module; name parameters "
            f"of the kernel without {', '.join(map(repr, without[:5]))}: parameters=[...]"
        )


def _largest(module: ShardedModule, sites: Sequence[Site]) -> int:
    return max((sum(module.parameters[name].numel() for name in site.names) for site in sites), default=0)


def _reached(outputs: Tensor, recorder: ShardedRecorder, names: Sequence[str]) -> list[str]:
    """Return those of some parameters by which the outputs have a derivative; their graph ends with this."""
    known = [name for name in names if name in recorder.found and recorder.found[name].requires_grad]
    if not known or not outputs.requires_grad:
        return []
    weights = [recorder.found[name] for name in known]
    found = torch.autograd.grad(outputs, weights, torch.ones_like(outputs), allow_unused=True)
    return [name for name, each in zip(known, found, strict=True) if each is not None]
