"""``Pullback``: J^T V by reverse mode; ``graph_size``: the memory that its graph takes.

J is the Jacobian of the outputs of a whole batch by the parameters, so samples may couple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.reading.samples import bytes_by_storage
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs

BATCH = 32
"""Number of vectors that go through one vectorised pass."""

WORKING_COPIES = 4
"""Memory of the gradients of activations in a pass, in units of the largest activation (an estimate)."""


@dataclass(frozen=True)
class GraphSize:
    """Sizes of what one forward saves for its backward."""

    saved_bytes: int  # without the tensors of the model
    largest: int  # elements of the largest tensor among them and the outputs
    outputs: int  # C


def graph_size(module: StatelessModule, names: Sequence[str], inputs: Inputs, *, limit: int | None = None) -> GraphSize:
    """Measure the graph of one forward over ``inputs`` that is differentiable by the parameters ``names``.

    Raises:
        MemoryError: the graph takes more than ``limit`` bytes; the forward is stopped there.
        RuntimeError: the forward itself raises it.

    Cost: one forward.
    """
    # The tensors of the model exist anyway, so they do not count.
    owned = {t.untyped_storage().data_ptr() for t in (*module.parameters.values(), *module.buffers.values())}
    given = bytes_by_storage(inputs)
    seen: set[int] = set()
    saved, largest = 0, 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved, largest
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and storage.data_ptr() not in seen:
            largest = max(largest, tensor.numel())
            seen.add(storage.data_ptr())
            saved += given.get(storage.data_ptr(), storage.nbytes())
        if limit is not None and saved > limit:
            raise MemoryError(
                f"max_memory: the activations of the batch take more than the {limit / 2**20:.3g} MiB that are left for them; "
                "use fewer samples or allow a larger max_memory"
            )
        return tensor

    leaves = _leaves(module, names)
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, _same):
            outputs = module.outputs(leaves, inputs)
    except RuntimeError as error:
        if "saved tensor" not in str(error):  # a forward that uses torch.func inside refuses these hooks
            raise
        outputs = module.outputs(leaves, inputs)
    return GraphSize(saved, max(largest, outputs.numel()), int(outputs.shape[1]))


def pays_to_batch(largest: int, device: torch.device) -> bool:
    """Return whether vectorised passes beat a loop, if the largest tensor in a pass has ``largest`` elements.

    Measured on two cores, vectorised passes are up to 3 times faster while the overhead of a pass dominates, and up to
    2 times slower from 2^17 elements on. The larger limit for accelerators is a guess.
    """
    return largest <= (2**16 if device.type == "cpu" else 2**22)


class Pullback:
    """The map J^T of one batch, from a single forward whose graph is kept.

    Args:
        module: the network as a function.
        names: parameters that J differentiates by.
        inputs: the batch of n samples.
        batched: whether several vectors go through one vectorised pass. If vmap does not support an operator, a loop
            takes over and ``reason`` says why.

    Cost: one forward; then one backward per vector.
    """

    def __init__(self, module: StatelessModule, names: Sequence[str], inputs: Inputs, *, batched: bool) -> None:
        self.leaves = _leaves(module, names)
        self.outputs = module.outputs(self.leaves, inputs)  # (n, C)
        self.batched = batched
        self.reason: str | None = None

    def __call__(self, cotangents: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Apply J^T to each vector of ``cotangents`` (b, n, C), and return (b, *shape) for each parameter."""
        wanted = {name: self.leaves[name] for name in (self.leaves if names is None else names)}
        found = self._gradients(list(wanted.values()), cotangents)
        return {
            name: leaf.new_zeros(len(cotangents), *leaf.shape) if gradient is None else gradient
            for (name, leaf), gradient in zip(wanted.items(), found, strict=True)
        }

    def reached(self) -> tuple[str, ...]:
        """Return the names of the parameters on which the outputs depend, at the cost of one backward."""
        found = self._gradients(list(self.leaves.values()), torch.ones_like(self.outputs)[None])
        return tuple(name for name, gradient in zip(self.leaves, found, strict=True) if gradient is not None)

    def _gradients(self, leaves: list[Tensor], cotangents: Tensor) -> Sequence[Tensor | None]:
        if not self.outputs.requires_grad:
            return [None] * len(leaves)
        if self.batched and len(cotangents) > 1:
            try:
                return torch.autograd.grad(
                    self.outputs, leaves, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # vmap does not support an operator
                self.batched, self.reason = False, str(error)
        rows = [
            torch.autograd.grad(self.outputs, leaves, cotangent, retain_graph=True, allow_unused=True)
            for cotangent in cotangents
        ]
        return [
            None if all(p is None for p in parts) else torch.stack([_or_zeros(p, leaf) for p in parts])
            for leaf, parts in zip(leaves, zip(*rows, strict=True), strict=True)
        ]


def _leaves(module: StatelessModule, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: module.parameters[name].detach().requires_grad_() for name in names}


def _or_zeros(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if gradient is None else gradient


def _same(tensor: Tensor) -> Tensor:
    return tensor
