"""``find_network``: whether a run trains one of the papers' own networks, so that what the paper proves is about this run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from lightning_conv.callbacks.certificates import require_same
from lightning_conv.evaluation import Inputs

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
    network: nn.Module, inputs: Inputs, kind: type[T], trained: Collection[str], *, asks: str = ""
) -> Found[T] | str:
    """The network of class ``kind`` that the module is, or hands its inputs to; otherwise the reason why it is none.

    Args:
        network: whose kernel is measured.
        inputs: of the probe.
        kind: the class.
        trained: names, in ``network``, of the parameters that the kernel is over.
        asks: what the paper is about, in words for the reader.
    """
    another = f"the theorem is about {asks or kind.__name__}, and the run trains another network"
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return another
    places = [(name, module) for name, module in network.named_modules() if isinstance(module, kind)]
    if len(places) != 1:
        return another
    ((name, own),) = places
    if not name:
        return Found(own, name, frozenset(trained))
    try:
        require_same(network, name, inputs)
    except Exception as error:  # the network cannot be called as its child is: then it does something else
        return f"{another} ({error})"
    inside = [each for each in trained if each.startswith(f"{name}.")]
    return Found(own, name, frozenset(each.removeprefix(f"{name}.") for each in inside))


def unit_rows(inputs: Tensor) -> bool:
    """Whether every input has norm 1, up to ``UNIT``."""
    norms = inputs.detach().cpu().double().flatten(1).norm(dim=1)
    return bool(((norms - 1).abs() <= UNIT).all())
