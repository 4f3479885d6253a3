"""``fault_of``: whether the rule of a layer reproduces the gradient of autograd, and ``measured``: the sizes of its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.kernels.reading.sample_axis import close
from lightning_conv.kernels.reading.sites import (
    Site,
    gradient_by_sample,
    prepare,
    site_gradients,
    site_inputs,
    site_rows,
    slot_of,
    tied_uses,
    token_gradients,
)
from lightning_conv.kernels.rules import EmbeddingRule, OuterRule


def fault_of(
    site: Site,
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor],
    samples: int,
    truth: Mapping[str, Tensor | None],
    tolerance: float,
    checked: int,
) -> str | None:
    """Return why the rule of a site may not be used.

    The result is None if the rule reproduces the gradient of the first ``checked`` samples.
    """
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
    """Return the gradient by one parameter, summed over the first ``checked`` samples, from the rule and from autograd.

    For a linear weight, which may have millions of elements, both gradients are multiplied by one random vector. It
    tells two matrices apart with probability one, and the first need not be formed. Another weight whose rule has the rows
    of ``OuterRule`` is summed by one product over samples and positions together, without the rows.
    """
    first = calls[site.uses[0].call]
    if slot_of(first, name) == ["weight"] and site.linear:
        vector = torch.randn(truth.shape[1], generator=torch.Generator().manual_seed(1)).to(truth)
        inputs = site_inputs(site, calls, samples)[:checked].flatten(0, 2)  # (n R, in)
        outer = site_gradients(site, calls, gradients, samples)[:checked].flatten(0, 2)
        return outer.T @ (inputs @ vector), truth @ vector
    if (uses := tied_uses(site, calls)) is not None:
        # By the rows of each use, a table per sample would be formed.
        linear, words = uses
        inputs = site_inputs(linear, calls, samples)[:checked].flatten(0, 2)
        outer = site_gradients(linear, calls, gradients, samples)[:checked].flatten(0, 2)
        found = outer.T @ inputs
        at, values = site_inputs(words, calls, samples)[:checked], token_gradients(words, calls, gradients, samples)
        there = at >= 0
        return found.index_add_(0, at[there], values[:checked][there]), truth
    if all(_sums_outer(calls[use.call], name, first) for use in site.uses):
        inputs = site_inputs(site, calls, samples)[:checked].flatten(0, 1).transpose(0, 1)  # (groups, n R, in)
        outer = site_gradients(site, calls, gradients, samples)[:checked].flatten(0, 1).permute(1, 2, 0)
        assert isinstance(first.rule, OuterRule)
        return first.rule.to_parameter(first.arguments, outer @ inputs), truth
    return site_rows(prepare(site, calls, samples), name, gradients, samples)[:checked].sum(0), truth


def _sums_outer(call: LayerCall, name: str, first: LayerCall) -> bool:
    """Return whether the rows of a parameter are sums of outer products and nothing else, alike for a call and the first one."""
    return (
        isinstance(call.rule, OuterRule)
        and call.rule is first.rule
        and call.arguments.get("groups", 1) == first.arguments.get("groups", 1)
        and type(call.rule).rows is OuterRule.rows
        and type(call.rule).prepare is OuterRule.prepare
        and slot_of(call, name) == ["weight"]
    )


def measured(site: Site, calls: Sequence[LayerCall], gradients: Sequence[Tensor], samples: int) -> Site:
    """Return the site with the sizes of its factors, where its derivative is a sum of outer products."""
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
    if (uses := tied_uses(site, calls)) is not None:
        linear, words = (measured(each, calls, gradients, samples) for each in uses)
        return replace(linear, uses=site.uses, kind="embedding and linear", words=words.positions)
    if all(isinstance(rule, EmbeddingRule) for rule in rules):
        moved = [gradient_by_sample(gradients[use.call], use.axis, samples) for use in site.uses]
        width = moved[0].shape[-1]
        return replace(site, positions=sum(m[0].numel() for m in moved) // width, gradients=width, tokens=True)
    return site
