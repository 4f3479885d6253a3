"""``layer_gradients``: norm of the gradient, share of zeros in it, and length of the update over the weights, layer by layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_conv.arguments import require_type
from lightning_conv.health.wording import listed
from lightning_conv.losses.gradient import norm


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of one layer, all of its weights together.

    Attributes:
        name: Of the layer; empty: the weights of the network itself.
        norm: |g|_2.
        zeros: Share of the entries of g that are exactly 0.
        update: |u|_2 over |w|_2, of the update u; NaN: u is not known, or w is zero.
    """

    name: str
    norm: float
    zeros: float
    update: float


def layer_gradients(
    gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], updates: Mapping[str, Tensor]
) -> list[LayerGradient]:
    """Measure the gradient and the update of every layer; weights of one module are one layer.

    Args:
        gradients: g by the name of the weight, in the network's order.
        weights: w by the same names.
        updates: u by name; weights that are left out have none that is known.

    Raises:
        TypeError: They do not come by name.
        ValueError: A gradient belongs to no weight.

    Cost: gradients, weights and updates are read once.
    """
    for name, given in (("gradients", gradients), ("weights", weights), ("updates", updates)):
        require_type(name, given, Mapping, "tensors by the name of the weight")
    if missing := [name for name in gradients if name not in weights]:
        raise ValueError(
            f"weights: none of {listed(missing)}, of which gradients= has the gradient; pass the same names"
        )
    layers: dict[str, list[str]] = defaultdict(list)
    for name in gradients:
        layers[name.rpartition(".")[0]].append(name)
    found = []
    for layer, names in layers.items():
        own = {name: gradients[name] for name in names}
        size = norm({name: weights[name].detach() for name in names})
        moved = norm({name: updates[name] for name in names}) if all(name in updates for name in names) else math.nan
        found.append(LayerGradient(layer, norm(own), zero_share(own), moved / size if size else math.nan))
    return found


def zero_share(gradients: Mapping[str, Tensor]) -> float:
    """Return the share of the entries of a gradient that are exactly 0; NaN: it has none.

    Dead units, unused rows of embeddings and layers behind a gate that is shut have a gradient of zeros.

    Args:
        gradients: g by the name of the weight.
    """
    entries = sum(each.numel() for each in gradients.values())
    zeros = sum(int((each == 0).sum()) for each in gradients.values())
    return zeros / entries if entries else math.nan
