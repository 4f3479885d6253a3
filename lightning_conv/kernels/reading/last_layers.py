"""``last_layers``: the parameters of the last layers that a network calls, enough of them for a kernel that is not singular."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_conv.kernels.reading.sites import layer_of
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs

ENOUGH = 2
"""Numbers of parameters for each row of the kernel of all outputs: with fewer than one it is singular, and with just one nearly so."""


def last_layers(
    module: StatelessModule, inputs: Inputs, among: Collection[str], *, rows: Callable[[int], int]
) -> tuple[str, ...]:
    """Return the parameters of the last layers in the order of calls, in the order of the model.

    A layer is a module with its own parameters; its place is that of the last call of a function of torch that takes one of them, so a
    tied weight stands where it is used last. From the end on, layers are taken until they have together ``ENOUGH`` numbers for each row
    of the kernel, or half of the numbers of all parameters. Parameters that no call is seen to take, as those of unused layers, are left
    out; where no call is seen at all, as in scripted modules, the order is that of the model.

    Args:
        module: The network, in ``undisturbed``.
        inputs: A few samples.
        among: Names of the parameters of which some are taken.
        rows: Number of rows of the kernel for a number C of outputs of a sample.

    Cost: one forward pass.
    """
    tracked = {name: tensor for name, tensor in module.parameters.items() if name in among}
    with _Uses(tracked) as uses:
        outputs = module.outputs({}, inputs).shape[1]
    order = {name: uses.last[name] for name in tracked if name in uses.last} or {
        name: place for place, name in enumerate(tracked)
    }
    layers: dict[str, list[str]] = {}
    for name in order:
        layers.setdefault(layer_of(name), []).append(name)
    by_call = sorted(layers.values(), key=lambda names: max(order[name] for name in names))
    enough = min(ENOUGH * rows(outputs), sum(tensor.numel() for tensor in tracked.values()) / 2)
    taken: set[str] = set()
    while by_call and sum(tracked[name].numel() for name in taken) < enough:
        taken.update(by_call.pop())
    return tuple(name for name in tracked if name in taken)


class _Uses(TorchFunctionMode):
    """Notes for each tensor the number of the last function that takes it and returns a tensor."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self.last: dict[str, int] = {}
        self._calls = 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self._calls += 1
        if any(isinstance(each, Tensor) for each in tree_leaves(made)):
            for each in tree_leaves((args, kwargs)):
                if (name := self._names.get(id(each))) is not None:
                    self.last[name] = self._calls
        return made
