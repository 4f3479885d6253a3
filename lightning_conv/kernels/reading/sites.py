"""``Site``: a parameter, or a weight with its bias, together with all calls that use it, and its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.kernels.reading.sample_axis import SampleAxis
from lightning_conv.kernels.rules import Arguments, EmbeddingRule, OuterRule
from lightning_conv.kernels.rules.linear import LinearRule


@dataclass(frozen=True)
class Use:
    """One call of a site: its index among the recorded calls, and where its samples are."""

    call: int
    axis: SampleAxis


@dataclass(frozen=True)
class Site:
    """A weight and the bias that always accompanies it (or one parameter alone), and their uses.

    A shared parameter is one site with several uses. Its derivatives are summed before the product, so that the cross
    terms are included.
    """

    layer: str
    weight: str | None
    bias: str | None
    uses: tuple[Use, ...]
    sizes: Mapping[str, int]  # elements of each parameter
    kind: str  # name of the rule, shown in the plan
    bias_in_product: bool = True  # whether the bias is a weight on an input that is always 1
    positions: int = 0  # R, all uses together; 0: the derivative is no outer product
    groups: int = 1
    inputs: int = 0  # numbers in a, per group
    gradients: int = 0  # numbers in b, per group
    input_numel: int = 0  # numbers in the layers' own inputs
    tokens: bool = False  # whether a is a one-hot word, which is not stored as numbers
    words: int = (
        0  # of a table that is also the weight of a linear layer: its positions as a table; the rest is of the layer
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def linear(self) -> bool:
        """Whether it is a plain linear layer that is called once."""
        return self.kind == "linear" and len(self.uses) == 1 and self.weight is not None

    @property
    def tied(self) -> bool:
        """Whether it is the table of an embedding and the weight of a linear layer."""
        return self.words > 0

    @property
    def passed_back(self) -> bool:
        """Whether a backward pass goes through its layers; below the first call nothing needs a gradient."""
        return self.tied or all(use.call for use in self.uses)

    @property
    def flops(self) -> float:
        """Flops of the product of B and A for one sample, which equal those of the layer's forward."""
        return 2.0 * self.positions * self.groups * self.inputs * self.gradients

    @property
    def numel(self) -> int:
        """Number of elements of its parameters."""
        return sum(self.sizes.values())


def layer_of(parameter: str) -> str:
    """Return the name of the module that owns a parameter; a parameter of the model itself is a layer of its own."""
    return parameter.rpartition(".")[0] or parameter


def slot_of(call: LayerCall, name: str) -> list[str]:
    """Return the arguments of the call that are this parameter; in p * p both are."""
    return [slot for slot, other in call.names.items() if other == name]


def arguments_by_sample(call: LayerCall, axis: SampleAxis, samples: int) -> tuple[dict[str, object], int]:
    """Return the arguments of a call with samples in front, and the number of rows of its batch per sample.

    Merged samples stay in one dimension, (n m, ...) with the sample outermost, since the rule expects one batch
    dimension.
    """
    moved = {}
    for name, tensor in call.sampled.items():
        moved[name] = _batch(axis.to_front(tensor, samples), axis)
    for slot in call.names:
        moved.pop(slot, None)
    return {**call.arguments, **moved}, _merged(call, axis, samples)


def _merged(call: LayerCall, axis: SampleAxis, samples: int) -> int:
    return 1 if axis.order == "whole" else call.shape[axis.dim] // samples


def _batch(front: Tensor, axis: SampleAxis) -> Tensor:
    """Merge samples and positions: (n, m, ...) -> (n m, ...); (n, ...) stays."""
    return front if axis.order == "whole" else front.flatten(0, 1)


def gradient_by_sample(gradient: Tensor, axis: SampleAxis, samples: int) -> Tensor:
    """Return B of one output in the layout of ``arguments_by_sample``."""
    return _batch(axis.to_front(gradient, samples), axis)


@dataclass(frozen=True)
class Prepared:
    """One use of a site on one batch: its arguments as the rule wants them, and the number of rows per sample."""

    use: Use
    call: LayerCall
    arguments: Arguments
    merged: int


def prepare(site: Site, calls: Sequence[LayerCall], samples: int) -> list[Prepared]:
    """Prepare the uses of a site: compute everything that does not depend on the outputs."""
    prepared = []
    for use in site.uses:
        call = calls[use.call]
        arguments, merged = arguments_by_sample(call, use.axis, samples)
        prepared.append(Prepared(use, call, call.rule.prepare(arguments), merged))
    return prepared


def site_rows(
    prepared: Sequence[Prepared], name: str, gradients: Mapping[int, Tensor] | Sequence[Tensor], samples: int
) -> Tensor:
    """Return the per-sample derivatives (n, P) of one output by one parameter of a site, summed over its uses.

    Args:
        prepared: the uses of the site.
        name: name of the parameter.
        gradients: B of the output, by call.
        samples: n.
    """
    total: Tensor | None = None
    for one in prepared:
        moved = gradient_by_sample(gradients[one.use.call], one.use.axis, samples)[:, None]
        for slot in slot_of(one.call, name):
            rows = one.call.rule.rows(one.arguments, slot, moved).reshape(len(moved), -1)
            if one.merged > 1:
                rows = torch.unflatten(rows, 0, (samples, one.merged)).sum(1)
            total = rows if total is None else total + rows
    assert total is not None
    return total


def own_arguments(site: Site, calls: Mapping[int, LayerCall], samples: int) -> list[Tensor]:
    """Return what the samples have of the arguments of all uses, (n, ...) each: A follows from it by ``site_inputs``."""
    return [
        use.axis.to_front(tensor, samples)
        for use in site.uses
        for name, tensor in calls[use.call].sampled.items()
        if name not in calls[use.call].names
    ]


def site_inputs(
    site: Site,
    calls: Mapping[int, LayerCall] | Sequence[LayerCall],
    samples: int,
    own: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return A, (n, R, groups, in), with the positions of all uses one after the other; for an embedding words, (n, R).

    Args:
        site: the site.
        calls: the recorded calls.
        samples: n.
        own: ``own_arguments`` of other samples, of which A is returned instead; None: those of the calls.
    """
    parts = []
    others = None if own is None else iter(own)
    for use in site.uses:
        call, rule = calls[use.call], calls[use.call].rule
        if others is None:
            arguments, merged = arguments_by_sample(call, use.axis, samples)
        else:
            moved = {name: next(others) for name in call.sampled if name not in call.names}
            merged = 1 if use.axis.order == "whole" else next(iter(moved.values())).shape[1]
            arguments = {**call.arguments, **{name: _batch(each, use.axis) for name, each in moved.items()}}
        if isinstance(rule, EmbeddingRule):
            factor = rule.tokens(arguments)
        else:
            assert isinstance(rule, OuterRule)
            factor = rule.factor_inputs(arguments)
        parts.append(_merge_positions(factor, samples, merged))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def site_gradients(
    site: Site, calls: Sequence[LayerCall], gradients: Mapping[int, Tensor] | Sequence[Tensor], samples: int
) -> Tensor:
    """Return B of one output, (n, R, groups, out), in the order of ``site_inputs``."""
    parts = []
    for use in site.uses:
        call = calls[use.call]
        assert isinstance(call.rule, OuterRule)
        moved = gradient_by_sample(gradients[use.call], use.axis, samples)
        # Only the shapes of the arguments are needed here, so they need not be moved.
        factor = call.rule.factor_gradients(call.arguments, moved)
        parts.append(_merge_positions(factor, samples, _merged(call, use.axis, samples)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def token_gradients(
    site: Site, calls: Sequence[LayerCall], gradients: Mapping[int, Tensor] | Sequence[Tensor], samples: int
) -> Tensor:
    """Return B of an embedding for one output, (n, R, d)."""
    parts = [gradient_by_sample(gradients[use.call], use.axis, samples) for use in site.uses]
    return torch.cat([part.reshape(samples, -1, part.shape[-1]) for part in parts], 1)


def tied_uses(site: Site, calls: Mapping[int, LayerCall] | Sequence[LayerCall]) -> tuple[Site, Site] | None:
    """Return a site's uses as the weight of a linear layer, and those as a table of an embedding; None unless it has both and no others."""
    of = {use: calls[use.call] for use in site.uses}
    words = tuple(use for use, call in of.items() if isinstance(call.rule, EmbeddingRule))
    linear = tuple(
        use
        for use, call in of.items()
        if isinstance(call.rule, LinearRule) and slot_of(call, site.weight or "") == ["weight"]
    )
    if not words or not linear or len(words) + len(linear) < len(site.uses) or site.bias is not None:
        return None
    return replace(site, uses=linear, words=0), replace(site, uses=words, words=0, tokens=True)


def _merge_positions(values: Tensor, samples: int, merged: int) -> Tensor:
    """Reshape (n m, R, ...) to (n, m R, ...)."""
    return values if merged == 1 else torch.unflatten(values, 0, (samples, merged)).flatten(1, 2)


def group_calls(calls: Sequence[LayerCall], axes: Mapping[int, SampleAxis], allowed: set[str]) -> list[Site]:
    """Group calls into the sites of the allowed parameters, in the order of their first use.

    Args:
        calls: the calls of one forward.
        axes: where the samples are, for the calls on which the outputs depend; the other calls contribute nothing.
        allowed: parameters whose uses are all among these calls.
    """
    uses: dict[str, list[int]] = {}
    for index, call in enumerate(calls):
        if index in axes:
            for name in dict.fromkeys(call.names.values()):
                if name in allowed:
                    uses.setdefault(name, []).append(index)
    sites, done = [], set()
    for name, indices in uses.items():
        if name in done:
            continue
        first = calls[indices[0]]
        partner = _partner(first, name)
        if partner not in allowed or uses.get(partner or "") != indices:
            partner = None
        weight, bias = (name, partner) if first.names.get("bias") != name else (partner, name)
        done |= {name, *([] if partner is None else [partner])}
        sites.append(_site(weight, bias, indices, calls, axes))
    return sites


def _partner(call: LayerCall, name: str) -> str | None:
    """Return the bias of a weight, or the weight of a bias."""
    other = {"weight": "bias", "bias": "weight"}
    slots = slot_of(call, name)
    return call.names.get(other.get(slots[0], "")) if len(slots) == 1 else None


def _site(
    weight: str | None,
    bias: str | None,
    indices: Sequence[int],
    calls: Sequence[LayerCall],
    axes: Mapping[int, SampleAxis],
) -> Site:
    uses = tuple(Use(index, axes[index]) for index in indices)
    rules = [calls[index].rule for index in indices]
    names = [name for name in (weight, bias) if name is not None]
    sizes = {}
    for name in names:
        call = calls[indices[0]]
        sizes[name] = prod(call.arguments[slot_of(call, name)[0]].shape)
    kind = type(rules[0]).__name__.removesuffix("Rule").lower()
    return Site(layer_of(names[0]), weight, bias, uses, sizes, kind)
