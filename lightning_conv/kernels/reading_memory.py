"""What reading a network takes in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_conv.evaluation import StatelessModule


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for a backward pass, and of further tensors, parameters apart and each once."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.bytes = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
        super().__init__(self.count, lambda tensor: tensor)

    def count(self, tensor: Tensor) -> Tensor:
        """Add the storage of ``tensor``, unless it has been counted; gives the tensor back."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def reading_bytes(module: StatelessModule, names: Sequence[str]) -> int:
    """Bytes that ``read_network`` takes beside the activations of its samples.

    Gradients, a copy of all parameters in the other precision, and the largest gradient in that with temporaries.
    """
    width = torch.finfo(module.dtype).bits // 8
    total = sum(parameter.numel() for parameter in module.parameters.values())
    asked = [module.parameters[name].numel() for name in names]
    return (12 - width) * total + width * sum(asked) + 24 * max(asked)


def peak_bytes(
    module: StatelessModule, names: Sequence[str], samples: int, checked: int, forward: int, gradients: int
) -> int:
    """Bytes that ``read_network`` takes at most: looking at the layers, at the parameters, and in the other precision.

    Args:
        module: the network.
        names: parameters.
        samples: that it was read on.
        checked: of them, those whose parameter gradients were looked at.
        forward: bytes of one sample's forward with its graph.
        gradients: numbers in B of one sample, all calls together.
    """
    width = torch.finfo(module.dtype).bits // 8
    kept = samples * (forward + width * gradients)
    asked = width * sum(module.parameters[name].numel() for name in names)
    twin = checked * (12 - width) * (forward + width * gradients) // width
    return max(
        kept + samples * width * gradients,
        kept + checked * forward + asked,
        kept + twin + reading_bytes(module, names),  # what was given back may not have gone back to the system
    )
