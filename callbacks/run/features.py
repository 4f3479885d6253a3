"""``last_features``: rank and alignment of the last hidden features on the probe, the facts of the expressivity condition."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.expressivity.singular import feature_rounding
from lightning_conv.networks.evaluation import Inputs
from lightning_conv.networks.head import find_head, last_hidden_features
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import ExpressivityFacts, expressivity_facts

UNREADABLE = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, OSError, MisconfigurationException)
"""Errors that a user's network or data may raise where they are read in another way than in the training step."""


def last_features(network: nn.Module, inputs: Inputs, targets: Tensor | None) -> ExpressivityFacts | str:
    """Measure rank [h, 1] of the last hidden features h in eval mode, and whether the targets lie in the range of [h, 1].

    The effect of rounding inside the trunk is estimated from a float32 evaluation, whatever the network's own type.

    Args:
        network: left as it is.
        inputs: n samples, on the network's device.
        targets: numbers or class numbers, one row per sample; any others are left out.

    Returns:
        The facts, or the reason why there are none.

    Cost: one forward pass in float32 and one in float64, and the singular values of an n x (m_H + 1) matrix.
    """
    with guarded(None, "", expects=UNREADABLE, say=None) as attempt:
        head = find_head(network, inputs)
        coarse, features = (
            last_hidden_features(network, head, inputs, dtype=dtype).cpu() for dtype in (torch.float32, torch.float64)
        )
        error = feature_rounding(coarse, features)
        return expressivity_facts(features, _rows(targets, len(features)), bias=head.has_bias, feature_error=error)
    return str(attempt.error)


def _rows(targets: Tensor | None, samples: int) -> Tensor | None:
    """Return the targets as ``certify_expressivity`` takes them, or None."""
    if targets is None or len(targets) != samples:
        return None
    if targets.is_floating_point():
        rows = targets.detach().cpu().double().reshape(samples, -1)
        return rows if float(rows.norm()) > 0 else None
    return targets.detach().cpu() if targets.ndim == 1 else None
