"""``Route``: how the sketch of one block is computed on a network that was read: from layer inputs and output gradients, or from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.kernels.reading.sites import (
    Site,
    prepare,
    site_gradients,
    site_inputs,
    site_rows,
    token_gradients,
)
from lightning_conv.sketches.layout import Block
from lightning_conv.sketches.sides import Sides, outer_sketch, projected, rows_sketch


class Route:
    """How the gradient of a block is found on one network. This one forms it, from a layer rule or from ``torch.func``.

    Args:
        block: the block.
        sites: the sites of those of its parameters that have a layer rule, by name.
        shapes: of its parameters.
    """

    def __init__(self, block: Block, sites: Mapping[str, Site], shapes: Mapping[str, torch.Size]) -> None:
        self.block, self.sites, self.shapes = block, sites, shapes

    @property
    def calls(self) -> set[int]:
        """Indices of the calls whose output gradients are needed."""
        return {use.call for site in self.sites.values() for use in site.uses}

    def numel(self) -> int:
        """Count the numbers that are formed for one sample."""
        return 2 * self.block.rows * self.block.columns

    def sketch(
        self,
        calls: Sequence[LayerCall],
        gradients: Mapping[int, Tensor],
        general: Mapping[str, Tensor],
        samples: int,
        sides: Sides,
    ) -> Tensor | None:
        """Return the sketches (n, G or 1, p, q); None: the outputs do not depend on the parameters.

        Args:
            calls: those of the forward.
            gradients: B, by the index of the call.
            general: rows (n, 1, P) of the parameters without a rule, by name.
            samples: n.
            sides: the projections of some groups.
        """
        parts: list[Tensor | None] = []
        for name in self.block.names:
            if name in general:
                rows = general[name].reshape(samples, -1)
            elif name in self.sites:
                rows = site_rows(prepare(self.sites[name], calls, samples), name, gradients, samples)
            else:
                parts.append(None)
                continue
            parts.append(rows)
        like = next((each for each in parts if each is not None), None)
        if like is None:
            return None
        whole = [
            like.new_zeros(samples, self.shapes[name].numel()) if each is None else each
            for name, each in zip(self.block.names, parts, strict=True)
        ]
        shaped = [each.reshape(samples, self.block.rows, -1) for each in whole]
        return rows_sketch(shaped[0] if len(shaped) == 1 else torch.cat(shaped, -1), sides)


class OuterRoute(Route):
    """From the inputs and the output gradients of a layer, whose gradient is a sum of outer products.

    Args:
        block: the block.
        site: that of its weight.
        order: place of each column of the block's weight among the rule's inputs; None: they are in one order.
    """

    def __init__(self, block: Block, site: Site, order: Tensor | None) -> None:
        super().__init__(block, dict.fromkeys(block.names, site), {})
        self.site, self.order = site, order

    def numel(self) -> int:
        """Count the numbers that are formed for one sample."""
        site = self.site
        return 2 * site.positions * (site.inputs + site.gradients)

    def sketch(
        self,
        calls: Sequence[LayerCall],
        gradients: Mapping[int, Tensor],
        general: Mapping[str, Tensor],
        samples: int,
        sides: Sides,
    ) -> Tensor | None:
        """See ``Route.sketch``."""
        inputs = site_inputs(self.site, calls, samples)[:, :, 0]
        if self.order is not None:
            inputs = inputs[..., self.order]
        if len(self.block.names) > 1:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        outer = site_gradients(self.site, calls, gradients, samples)[:, :, 0]
        return outer_sketch(outer, inputs, sides)


class TokenRoute(Route):
    """From the words and the output gradients of an embedding: the one-hot words are the left side and are not formed.

    Args:
        block: the block.
        site: that of the table.
    """

    def __init__(self, block: Block, site: Site) -> None:
        super().__init__(block, dict.fromkeys(block.names, site), {})
        self.site = site

    def numel(self) -> int:
        """Count the numbers that are formed for one sample."""
        return 4 * self.site.positions * self.site.gradients

    def sketch(
        self,
        calls: Sequence[LayerCall],
        gradients: Mapping[int, Tensor],
        general: Mapping[str, Tensor],
        samples: int,
        sides: Sides,
    ) -> Tensor | None:
        """See ``Route.sketch``."""
        words = site_inputs(self.site, calls, samples)
        vectors = token_gradients(self.site, calls, gradients, samples) * (words >= 0)[..., None]
        words = words.clamp(min=0)
        if sides.left is None:
            left = F.one_hot(words, self.block.rows).to(vectors)[:, :, None]
        else:
            left = sides.left[:, :, words].permute(2, 3, 0, 1)  # (n, R, G, p)
        right = vectors[:, :, None] if sides.right is None else projected(vectors, sides.right)
        return left.permute(0, 2, 3, 1) @ right.transpose(1, 2)


class SumRoute(Route):
    """The sum over several uses of one weight, such as a table of words that is the last layer, too.

    Args:
        block: the block.
        site: that of the weight.
        routes: those of its uses as words and as a linear layer.
    """

    def __init__(self, block: Block, site: Site, routes: Sequence[Route]) -> None:
        super().__init__(block, dict.fromkeys(block.names, site), {})
        self.routes = routes

    def numel(self) -> int:
        """Count the numbers that are formed for one sample, beside the inputs and output gradients of the layers."""
        return 0

    def sketch(
        self,
        calls: Sequence[LayerCall],
        gradients: Mapping[int, Tensor],
        general: Mapping[str, Tensor],
        samples: int,
        sides: Sides,
    ) -> Tensor | None:
        """See ``Route.sketch``."""
        parts = [each.sketch(calls, gradients, general, samples, sides) for each in self.routes]
        first, *others = [each for each in parts if each is not None]
        for other in others:
            first = first + other
        return first
