"""``last_features``: the last hidden features of a network on the probe, with their rounding error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.expressivity.singular import feature_rounding, narrow_rounding
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import head_again
from lightning_conv.networks.hidden_features import last_hidden_features, watched_features
from lightning_conv.networks.inputs import Inputs


@dataclass(frozen=True)
class LastFeatures:
    """What enters the last linear layer, in eval mode."""

    values: Tensor  # h, (n, m_H), float64, on the CPU
    error: float  # estimated effect of rounding inside the trunk, as ``feature_rounding`` returns it
    bias: bool  # whether the last layer trains a bias, so that [h, 1] and not h alone counts
    narrow: str | None = None  # where the network casts to a narrower type; empty: nowhere; None: not watched
    head: str = ""  # name of the last linear layer


def last_features(network: nn.Module, inputs: Inputs, head: str = "") -> LastFeatures | str:
    """Compute the last hidden features, or say why there are none.

    The effect of rounding inside the trunk is estimated from a float32 evaluation, whatever the network's own type.

    Args:
        network: left as it is.
        inputs: n samples, on the network's device.
        head: name of the last linear layer at other weights; empty: not known.

    Cost: one forward pass in float32 and one in float64.
    """
    with attempted(*READING) as attempt:
        found, seen = head_again(network, inputs, head)
        if seen is None or seen.dtype != torch.float32:
            seen = last_hidden_features(network, found, inputs, dtype=torch.float32)
        coarse = seen.cpu()
        fine, narrowing = watched_features(StatelessModule(network, dtype=torch.float64), found, inputs)
        values = fine.cpu()
        if narrowing is not None:
            error = narrow_rounding(coarse, values, narrowing.unit)
            return LastFeatures(values, error, found.has_bias, str(narrowing), found.name)
        return LastFeatures(values, feature_rounding(coarse, values), found.has_bias, "", found.name)
    return str(attempt.error)
