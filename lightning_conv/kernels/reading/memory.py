"""The memory that reading a network takes: counters of bytes, and estimates made before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_conv.kernels.reading.samples import bytes_by_storage
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves for a backward pass, each storage once and parameters excluded.

    If ``inputs`` are views into larger storages, only their own bytes count. Further tensors can be added by ``count``.
    """

    def __init__(self, parameters: Mapping[str, Tensor], inputs: Inputs) -> None:
        self.bytes = 0
        self._given = bytes_by_storage(inputs)
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
        super().__init__(self.count, lambda tensor: tensor)

    def count(self, tensor: Tensor) -> Tensor:
        """Add the bytes of the storage of ``tensor`` unless it has been counted, and return the tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += self._given.get(storage.data_ptr(), storage.nbytes())
        return tensor


class MadeBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are created, below autograd and ``torch.func``.

    Apart from parameters and inputs, a forward has created everything that it saves for its backward pass. So this is
    an upper estimate of the memory of its graph, for forwards that ``SavedBytes`` cannot watch.
    """

    def __init__(self) -> None:
        self.bytes = 0
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _stored((args, kwargs))}
        made = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _stored(result)}
        self.bytes += sum(size for address, size in made.items() if address not in given)
        return result


def _stored(nest: object) -> list[Tensor]:
    """Return the tensors in a nest that occupy memory, which the symbolic zeros of forward derivatives do not."""
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor) and not leaf._is_zerotensor()]


def reading_bytes(module: StatelessModule, names: Sequence[str]) -> int:
    """Return the bytes that ``read_network`` takes beside the activations of its samples.

    They are the gradients, a copy of all parameters in the other precision, and the largest gradient in that precision,
    three times: of a weight with two uses, its parts and their sum.
    """
    width = torch.finfo(module.dtype).bits // 8
    total = sum(parameter.numel() for parameter in module.parameters.values())
    asked = [module.parameters[name].numel() for name in names]
    return (12 - width) * total + width * sum(asked) + 24 * max(asked)


def peak_bytes(
    module: StatelessModule, names: Sequence[str], samples: int, checked: int, forward: int, gradients: int
) -> int:
    """Return the peak of the bytes that ``read_network`` takes: for the layers, the gradients, or the other precision.

    Args:
        module: the network.
        names: parameters to differentiate by.
        samples: number of samples that were read.
        checked: number of those whose parameter gradients were compared.
        forward: bytes of one sample's forward with its graph.
        gradients: numbers in B for one sample, all calls together.
    """
    width = torch.finfo(module.dtype).bits // 8
    kept = samples * (forward + width * gradients)
    asked = width * sum(module.parameters[name].numel() for name in names)
    twin = checked * (12 - width) * (forward + width * gradients) // width
    return max(
        kept + samples * width * gradients,
        kept + checked * forward + asked,
        # Small pieces that were freed may not have been returned to the system; the activations of a large network are.
        (kept if checked == samples else 0) + twin + reading_bytes(module, names),
    )
