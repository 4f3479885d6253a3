"""``layer_signal``: how much of what tells the samples apart arrives in each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.health.layers.checked import require_samples
from lightning_conv.networks.batch_norm import BatchStatistics
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.undisturbed import undisturbed

LAYERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.modules.conv._ConvNd)
"""Layers whose outputs are looked at: those that mix or look up."""


@dataclass(frozen=True)
class LayerSignal:
    """The outputs of a layer.

    Attributes:
        name: Dotted name of the module.
        spread: Root mean square, over its units and places, of the standard deviation over the samples.
    """

    name: str
    spread: float


def layer_signal(
    model: nn.Module,
    inputs: Inputs,
    *,
    batch_norm: BatchNormMode = "eval",
    statistics: BatchStatistics | None = None,
) -> list[LayerSignal]:
    r"""Measure the spread of the outputs of every linear layer, convolution and embedding, in the order of their last calls.

    .. math:: s_l = \Big( \frac{1}{n m} \sum_{i, k} (h_{lik} - \bar h_{lk})^2 \Big)^{1/2}

    with h_lik unit k of layer l for sample i. The mean over the samples is removed, since biases add to it what tells no sample from
    another.

    Args:
        model: The network; it is not changed.
        inputs: n samples.
        batch_norm: See ``ntk_gram``.
        statistics: Those of the samples at the present weights, where they are known, for ``"frozen"``; None: a forward finds them.

    Raises:
        TypeError: The model is no module, or the inputs are no tensors.
        ValueError: The inputs are not finite, ``batch_norm`` is unknown, or there are fewer than two samples.

    Cost: one forward pass, and one more for statistics that are not known.
    """
    count = require_samples(model, inputs, batch_norm)
    found: dict[str, float] = {}

    def seen(name: str) -> Callable[..., None]:
        def look(module: nn.Module, given: Any, made: Any) -> None:
            if isinstance(made, Tensor) and made.ndim > 1 and len(made) == count and made.is_floating_point():
                wide = made.detach().cpu().double()
                found.pop(name, None)
                found[name] = float((wide - wide.mean(0)).square().mean().sqrt())

        return look

    handles = [
        each.register_forward_hook(seen(name)) for name, each in model.named_modules() if isinstance(each, LAYERS)
    ]
    try:
        with undisturbed(model), torch.no_grad():
            module = StatelessModule(
                model, batch_norm=batch_norm, statistics_of=inputs if statistics is None else statistics
            )
            module.call({}, module.convert(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [LayerSignal(name, spread) for name, spread in found.items()]
