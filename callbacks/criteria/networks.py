"""``find_network``: whether a run trains one of the papers' own networks, so that what the paper proves is about this run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from lightning_conv.callbacks.criteria.certificates import require_same
from lightning_conv.networks.evaluation import Inputs

T = TypeVar("T", bound=nn.Module)

UNIT = 1e-4
"""How far the norm of an input may be from the 1 that a paper asks for."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """A paper's network in a run."""

    network: T
    place: str  # its name in the module whose kernel is measured; empty: it is the module
    trained: frozenset[str]  # its parameters that the kernel is over, by their names in it


def find_network(
    network: nn.Module,
    inputs: Inputs,
    kinds: type[T] | tuple[type[T], ...],
    trained: Collection[str],
    *,
    asks: str = "",
) -> Found[T] | str:
    """The network of one of the ``kinds`` that the module is, or hands its inputs to; otherwise the reason why it is none.

    What a subclass computes is not known to be the paper's. Nor is a network the paper's that has a trained parameter outside of it: where
    that does nothing at the present weights, such as a factor of 1, it will after the first step.

    Args:
        network: whose kernel is measured.
        inputs: of the probe.
        kinds: the class, or several of one paper.
        trained: names, in ``network``, of the parameters that the kernel is over.
        asks: what the paper is about, in words for the reader.
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
    try:
        require_same(network, name, inputs)
    except Exception as error:  # the network cannot be called as its child is: then it does something else
        return f"{another} ({error})"
    return Found(own, name, inside)


def unit_rows(inputs: Tensor) -> bool:
    """Whether every input has norm 1, up to ``UNIT``."""
    norms = inputs.detach().cpu().double().flatten(1).norm(dim=1)
    return bool(((norms - 1).abs() <= UNIT).all())
