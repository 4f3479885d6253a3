"""``read_sharded``: what is found in a sharded module on a few samples, without all of its gradients at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_conv.kernels.reading.anatomy import READ_SAMPLES, Anatomy
from lightning_conv.kernels.reading.recording import layer_gradients, record, signature_of
from lightning_conv.kernels.reading.rule_check import fault_of, measured
from lightning_conv.kernels.reading.sample_axis import sample_axes
from lightning_conv.kernels.reading.sites import Site, group_calls
from lightning_conv.kernels.sharded.module import ShardedModule, ShardedRecorder
from lightning_conv.kernels.sharded.rounding import rounding_of
from lightning_conv.machine.clock import now
from lightning_conv.machine.memory import blocks
from lightning_conv.networks.inputs import Inputs, sample_count, spread, take
from lightning_conv.networks.sharded import whole

NO_SAMPLES = "has a layer whose outputs show no samples (samples that couple, or no gradient at these weights)"

ROWS = 16
"""Samples that pass through the network at once where only the uses of a few parameters are looked for."""


def read_sharded(module: ShardedModule, names: tuple[str, ...], inputs: Inputs) -> Anatomy:
    """Find the layer rules of the parameters ``names`` as ``read_network`` does, where no process has all of them.

    Each rule is compared with the gradient of autograd, for a few parameters at a time: never more than the largest layer has.

    Args:
        module: the network, inside ``undisturbed`` and ``as_found``.
        names: parameters to differentiate by.
        inputs: the samples of the kernel.

    Raises:
        ValueError: a parameter has no layer rule.

    Cost: a forward of three samples with 2 + P / (the numbers of the largest layer) backward passes, and two of each for the rounding.
    """
    few = spread(inputs, READ_SAMPLES)
    samples = sample_count(few)
    generator = torch.Generator().manual_seed(0)
    start = now(module.device)
    outputs, recorder = record(module, few, {name: module.parameters[name] for name in names})
    forward_seconds = (now(module.device) - start) / samples
    assert isinstance(recorder, ShardedRecorder)
    calls = recorder.calls
    mixture = torch.randn(outputs.shape, generator=generator).to(outputs)
    weights = torch.rand(samples, generator=generator).add_(0.5).to(outputs)
    plain = layer_gradients(outputs, mixture, calls, keep=True)
    tolerance = torch.finfo(module.dtype).eps ** 0.5
    start = now(module.device)
    weighted = layer_gradients(outputs, weights[:, None] * mixture, calls, keep=True)
    backward_seconds = (now(module.device) - start) / samples
    axes = sample_axes(calls, plain, weighted, weights, tolerance)
    del weighted
    why = dict.fromkeys(recorder.elsewhere, "is used by functions without a layer rule")
    for index, call in enumerate(calls):
        if plain[index] is not None and index not in axes:
            why |= dict.fromkeys(call.names.values(), NO_SAMPLES)
    present = [outputs.new_zeros(call.shape) if p is None else p for call, p in zip(calls, plain, strict=True)]
    sites: list[Site] = []
    unused: list[str] = []
    candidates = group_calls(calls, axes, set(names) - set(why))
    alone = [name for name in names if all(name not in site.names for site in candidates)]
    for group in _batches(module, candidates):
        truth = _gradients(outputs, recorder, [name for site in group for name in site.names], mixture)
        for site in group:
            if all(truth[name] is None for name in site.names):
                unused += site.names
                continue
            fault = fault_of(site, calls, present, samples, truth, tolerance, samples)
            if fault is None:
                sites.append(measured(site, calls, present, samples))
            else:
                why |= dict.fromkeys(site.names, fault)
    for name in alone:
        if _gradients(outputs, recorder, [name], mixture)[name] is None:
            unused.append(name)
        else:
            why.setdefault(name, "has no layer rule")
    _require_rules(names, why)
    numbers = sum(sum(t.numel() for t in call.sampled.values()) + call.shape.numel() for call in calls)
    width = torch.finfo(module.dtype).bits // 8
    forward_bytes = -(-(2 * width * numbers + 3 * recorder.largest) // samples)
    signature, gradient_numel = signature_of(calls), sum(call.shape.numel() for call in calls) // samples
    classes = int(outputs.shape[1])
    # The graph ends here, and with it what the parts of the module have gathered.
    layer_gradients(outputs, mixture, calls[:1], keep=False)
    del outputs, plain, present, calls, recorder
    anatomy = Anatomy(
        parameters=names,
        sites=tuple(sites),
        general={},
        unused=tuple(name for name in names if name in unused),
        outputs=classes,
        level=0.0,
        tracked=names,
        signature=signature,
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
    return rounded_again(anatomy, module, inputs)


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
        late = [name for name, each in _gradients(outputs, recorder, anatomy.unused).items() if each is not None]
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


def _batches(module: ShardedModule, sites: Sequence[Site]) -> list[list[Site]]:
    """Cut the sites into groups that have no more numbers than the largest of them."""
    groups: list[list[Site]] = []
    most, left = _largest(module, sites), 0
    for site in sites:
        size = _largest(module, [site])
        if size > left:
            groups.append([])
            left = most
        groups[-1].append(site)
        left -= size
    return groups


def _gradients(
    outputs: Tensor, recorder: ShardedRecorder, names: Sequence[str], mixture: Tensor | None = None
) -> dict[str, Tensor | None]:
    """Return whole gradients of a combination of the outputs (their sum, if None) by some parameters; None: it does not enter."""
    known = [name for name in names if name in recorder.found and recorder.found[name].requires_grad]
    if not known or not outputs.requires_grad:
        return dict.fromkeys(names)
    weights = [recorder.found[name] for name in known]
    given = torch.ones_like(outputs) if mixture is None else mixture
    found = torch.autograd.grad(outputs, weights, given, retain_graph=True, allow_unused=True)
    return dict.fromkeys(names) | {
        name: None if each is None else whole(each) for name, each in zip(known, found, strict=True)
    }
