"""Which parameters form a block, and which route is the cheapest for each block of a network that was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_conv.kernels.reading.anatomy import Anatomy
from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.kernels.reading.sites import Site, tied_uses
from lightning_conv.kernels.rules import OuterRule
from lightning_conv.sketches.layout import Block
from lightning_conv.sketches.routes import OuterRoute, Route, SumRoute, TokenRoute


def column_order(site: Site, calls: Sequence[LayerCall], columns: int) -> Tensor | None:
    """Return the place of each column of a weight, as a matrix, among the inputs that its rule gives; empty: it is no such matrix.

    A convolution's rule has the channels of a patch innermost, its weight has them outermost. A transposed convolution's output
    gradients belong to the columns, so it has no such order. None: the order is the same.

    Args:
        site: the site of the weight, of one group.
        calls: the calls of a forward.
        columns: of the weight as a matrix.
    """
    call = calls[site.uses[0].call]
    assert isinstance(call.rule, OuterRule)
    given = torch.arange(site.gradients * site.inputs).reshape(1, site.gradients, site.inputs)
    places = call.rule.to_parameter(call.arguments, given).reshape(-1)
    if places.numel() != site.gradients * columns:
        return places[:0]
    table = places.reshape(site.gradients, columns)
    order = table[0]
    if not torch.equal(table, order + site.inputs * torch.arange(site.gradients)[:, None]):
        return places[:0]
    return None if torch.equal(order, torch.arange(columns)) else order


def is_outer(site: Site, shapes: Mapping[str, torch.Size]) -> bool:
    """Return whether the gradient by the weight of a site is a sum of outer products of one group."""
    weight = site.weight
    return (
        weight is not None and site.positions > 0 and not site.tokens and site.groups == 1 and len(shapes[weight]) > 1
    )


def block_names(anatomy: Anatomy, shapes: Mapping[str, torch.Size]) -> list[tuple[str, ...]]:
    """Return the parameters in blocks: a weight with the bias that acts as a weight on a constant input, each other one alone."""
    pairs = {
        site.weight: site.bias
        for site in anatomy.sites
        if site.weight and site.bias and is_outer(site, shapes) and site.bias_in_product
    }
    pairs = {w: b for w, b in pairs.items() if w and b and shapes[b].numel() == shapes[w][0]}
    biases = set(pairs.values())
    return [(name, *([bias] if (bias := pairs.get(name)) else [])) for name in anatomy.parameters if name not in biases]


def routes_of(
    anatomy: Anatomy, blocks: Sequence[Block], shapes: Mapping[str, torch.Size], calls: Sequence[LayerCall]
) -> list[Route]:
    """Return the cheapest route of each block on a network that was read.

    Args:
        anatomy: what was read.
        blocks: the blocks.
        shapes: of all parameters.
        calls: those of a forward, for the shapes of their arguments.
    """
    sites = {name: site for site in anatomy.sites for name in site.names}
    return [_route(block, sites, shapes, calls) for block in blocks]


def _route(
    block: Block, sites: Mapping[str, Site], shapes: Mapping[str, torch.Size], calls: Sequence[LayerCall]
) -> Route:
    site = sites.get(block.names[0])
    if site is not None and site.weight == block.names[0]:
        if site.tokens and len(block.names) == 1:
            return TokenRoute(block, site)
        if len(block.names) == 1 and (uses := tied_uses(site, calls)) is not None:
            linear, words = uses
            return SumRoute(block, site, [TokenRoute(block, words), OuterRoute(block, linear, None)])
        paired = block.names[1:] == () or (site.bias == block.names[1] and site.bias_in_product)
        if is_outer(site, shapes) and paired:
            order = column_order(site, calls, block.columns - len(block.names) + 1)
            if order is None or len(order):
                return OuterRoute(block, site, order)
    return Route(block, {name: sites[name] for name in block.names if name in sites}, shapes)
