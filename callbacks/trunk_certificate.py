"""The certificate of a trunk on its training set: features held where they are few, computed strip by strip where they are many."""

from __future__ import annotations

import torch
from torch import nn

from lightning_conv.anatomy import Head
from lightning_conv.callbacks.training_set import TrainingSet
from lightning_conv.expressivity import RankCertificate, certify_expressivity
from lightning_conv.expressivity.certify import is_held
from lightning_conv.expressivity.singular import feature_rounding

SAMPLED = 512
"""Samples on which the rounding inside the trunk is measured where there are many."""


def certify_trunk(data: TrainingSet, network: nn.Module, head: Head) -> RankCertificate:
    """Certify rank [h, 1] = n for the trunk as it is.

    Args:
        data: the training set.
        network: that takes its inputs.
        head: of the network.
    """
    if is_held(data.size, head.width, bias=head.has_bias):
        # In float32 whatever the model's type: the error of these features is scaled to float64.
        return certify_expressivity(
            data.features(network, head, torch.float32),
            bias=head.has_bias,
            recompute=lambda: data.features(network, head, torch.float64),
            same_inputs=data.same_inputs,
        )
    rows = data.feature_rows(network, head, torch.float64)
    coarse = data.feature_rows(network, head, torch.float32).rows(0, SAMPLED)
    error = feature_rounding(coarse, rows.rows(0, SAMPLED)) * (data.size / SAMPLED) ** 0.5
    return certify_expressivity(rows, bias=head.has_bias, feature_error=error)
