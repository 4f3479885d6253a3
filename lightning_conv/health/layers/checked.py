"""``require_samples``: the checks of what is looked at layer by layer."""

from __future__ import annotations

from typing import get_args

from torch import nn

from lightning_conv.arguments import require_option
from lightning_conv.kernels.reading.samples import require_float_inputs
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.supported import require_module


def require_samples(model: nn.Module, inputs: Inputs, batch_norm: BatchNormMode) -> int:
    """Return the number of samples, after the arguments were checked.

    Args:
        model: The network.
        inputs: The samples.
        batch_norm: See ``ntk_gram``.

    Raises:
        TypeError: The model is no module, or the inputs are no tensors.
        ValueError: The inputs are not finite, ``batch_norm`` is unknown, or there are fewer than two samples.
    """
    require_module(model)
    require_option("batch_norm", batch_norm, get_args(BatchNormMode))
    require_float_inputs(inputs)
    count = sample_count(inputs)
    if count < 2:
        raise ValueError(f"inputs: {count} sample; need at least two")
    return count
