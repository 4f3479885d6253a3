"""``require_samples``: the checks of what is looked at layer by layer."""

from __future__ import annotations

from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_conv.arguments import require_option
from lightning_conv.kernels.reading.samples import require_float_inputs
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.supported import require_module
from lightning_conv.networks.undisturbed import undisturbed


def require_samples(model: nn.Module, inputs: Inputs, batch_norm: BatchNormMode) -> int:
    """Return the number of samples, after the arguments were checked.

    Args:
        model: The network.
        inputs: The samples.
        batch_norm: See ``ntk_gram``.

    Raises:
        TypeError: The model is no module, or the inputs are no tensors.
        ValueError: The inputs and the outputs are not finite, ``batch_norm`` is unknown, or there are fewer than two samples.
    """
    require_module(model)
    require_option("batch_norm", batch_norm, get_args(BatchNormMode))
    require_float_inputs(inputs, partial(outputs_of, model, inputs, batch_norm))
    count = sample_count(inputs)
    if count < 2:
        raise ValueError(f"inputs: {count} sample; need at least two")
    return count


def outputs_of(model: nn.Module, inputs: Inputs, batch_norm: BatchNormMode) -> Tensor:
    """Return the outputs u, (n, C), and leave the network as it is.

    Args:
        model: The network.
        inputs: The samples.
        batch_norm: See ``ntk_gram``.
    """
    with undisturbed(model), torch.no_grad():
        module = StatelessModule(model, batch_norm=batch_norm, statistics_of=inputs)
        return module.outputs({}, module.convert(inputs))
