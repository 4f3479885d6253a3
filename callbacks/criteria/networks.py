"""``find_network``: does a run train one of the papers' own networks, so that what the paper proves is about this run?"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.undisturbed import undisturbed

T = TypeVar("T", bound=nn.Module)

UNIT = 1e-4
"""How far the norm of an input may be from the 1 that a paper asks for."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """A paper's network in a run."""

    network: T
    place: str  # its name in the module whose kernel is measured; empty: it is that module
    trained: frozenset[str]  # its parameters that the kernel is over, by their names in it


def find_network(
    network: nn.Module,
    inputs: Inputs,
    kinds: type[T] | tuple[type[T], ...],
    trained: Collection[str],
    *,
    asks: str = "",
) -> Found[T] | str:
    """Return the one network of the given kinds that the module is, or hands its inputs to; otherwise say why there is none.

    A subclass may compute something else, so it does not count. Nor does a network with a trained parameter outside of it: a factor
    of 1, for example, makes no difference at the present weights, but it does after the first step.

    Args:
        network: whose kernel is measured.
        inputs: of the probe.
        kinds: a class, or several classes of one paper.
        trained: names, in ``network``, of the parameters that the kernel is over.
        asks: what the paper is about, in words.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    asks = asks or " or ".join(kind.__name__ for kind in kinds)
    another = f"the theorem is about {asks}, and the run trains another network"
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return another
    places = [(name, module) for name, module in network.named_modules() if isinstance(module, kinds)]
    if len(places) != 1:
        return another
    ((name, own),) = places
    if type(own) not in kinds:
        return f"{another} ({type(own).__name__}, a subclass that may compute something else)"
    if not name:
        return Found(own, name, frozenset(trained))
    inside = frozenset(each.removeprefix(f"{name}.") for each in trained if each.startswith(f"{name}."))
    if len(inside) != len(trained):
        outside = next(each for each in trained if not each.startswith(f"{name}."))
        return f"{another} ({outside} is trained too)"
    with attempted(*READING) as attempt:
        require_same(network, name, inputs)
    # A network that cannot be called as its child is does something else.
    return f"{another} ({attempt.error})" if attempt.failed else Found(own, name, inside)


def unit_rows(inputs: Tensor) -> bool:
    """Return whether every input has norm 1, up to ``UNIT``."""
    norms = inputs.detach().cpu().double().flatten(1).norm(dim=1)
    return bool(((norms - 1).abs() <= UNIT).all())


def sole_child(network: nn.Module, inputs: Tensor) -> str:
    """Return the name of the module to which this one hands its inputs, as ``self.net(x)`` does; empty: the network itself.

    The search descends as long as a module is the same function of inputs and weights as its only child with parameters. It ends at
    an ``nn.Sequential``, and at a module that has parameters of its own or several such children.

    Raises:
        ValueError: a child gives other outputs, at the present weights or at random ones.
    """
    path = ""
    while True:
        module = network.get_submodule(path)
        own = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
        if isinstance(module, nn.Sequential) or len(own) != 1 or any(True for _ in module.parameters(recurse=False)):
            return path
        require_same(module, own[0], inputs)
        path = f"{path}.{own[0]}" if path else own[0]


def require_same(network: nn.Module, name: str, inputs: Tensor) -> None:
    """Check that a network is the same function of inputs and weights as its submodule ``name``.

    Raises:
        ValueError: it gives other outputs, at the present weights or at random ones.
    """
    child, generator = network.get_submodule(name), torch.Generator().manual_seed(0)
    with undisturbed(network), torch.no_grad():
        whole, part = StatelessModule(network, dtype=torch.float64), StatelessModule(child, dtype=torch.float64)
        rows = whole.convert(inputs)
        for draw in range(3):
            weights = {
                key: value
                if draw == 0
                else torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
                for key, value in part.parameters.items()
            }
            outputs = whole.outputs({f"{name}.{key}": value for key, value in weights.items()}, rows)
            if not torch.allclose(outputs, part.outputs(weights, rows), rtol=1e-9, atol=1e-12):
                raise ValueError(f"model: {type(network).__name__} is not its child {name!r} alone")
