"""The one call of a training step that is the network: which tensors of the batch enter it, and how it is made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.step.observed import Observed
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.observed.leaves import Place, at, tensors_in, with_tensors
from lightning_conv.networks.observed.replay import Given, OutputPlace
from lightning_conv.networks.undisturbed import undisturbed


class _Entered(BaseException):
    """The call that is the network has begun."""


def inputs_of_call(twin: Twin, observed: Observed, batch: Any) -> dict[str, tuple[Place, int]] | None:
    """Return which tensors of the batch enter the call that is the network, by the names of its inputs, with the axis of the samples.

    None: something else enters, such as a part of a tensor or what the step makes of it.

    Args:
        twin: A copy of the module.
        observed: The network.
        batch: A batch.
    """
    entered: list[Any] = []
    number = 0 if observed.source is None or observed.source.name != observed.call else observed.source.number

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entered.append((args, dict(kwargs)))
        if len(entered) > number:
            raise _Entered

    own = with_tensors(batch, lambda _, tensor: tensor.detach().clone())
    hook = twin.module.get_submodule(observed.call or "").register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with undisturbed(twin.module), twin.refused_to_the_original():
            twin.bare_step(own)
    except _Entered:
        pass
    finally:
        hook.remove()
    if not entered or not _same(entered[-1], observed.given.structure):
        return None
    places = {id(tensor): place for place, tensor in tensors_in(own)}
    found = {}
    for place, tensor in tensors_in(entered[-1]):
        if id(tensor) not in places:
            return None
        if name := next((name for name, its in observed.given.samples.items() if its == place), None):
            found[name] = places[id(tensor)], observed.given.axes.get(place, 0)
    return found if found.keys() == observed.given.samples.keys() else None


def _same(some: Any, other: Any) -> bool:
    """Return whether two calls have equal tensors at the same places."""
    ours, theirs = dict(tensors_in(some)), dict(tensors_in(other))
    return ours.keys() == theirs.keys() and all(torch.equal(each, theirs[place]) for place, each in ours.items())


@dataclass(frozen=True)
class At:
    """Takes what stands at a place out of a batch.

    Args:
        place: The place.
    """

    place: Place

    def __call__(self, batch: Any) -> Any:
        """Return it.

        Args:
            batch: A batch.
        """
        return at(batch, self.place)


@dataclass(frozen=True)
class InputsOfBatch:
    """Takes the inputs of a network out of a batch: tensors with the samples along the first axis, by name unless said otherwise."""

    places: Mapping[str, tuple[Place, int]]
    bare: bool = False  # whether the one tensor is taken by itself
    row: bool = False  # whether they are taken by position

    def __call__(self, batch: Any) -> Inputs:
        """Return the inputs.

        Args:
            batch: A batch.
        """
        held = {name: (at(batch, place), axis) for name, (place, axis) in self.places.items()}
        # The batch's own tensors where they can be: samples are recognised by these.
        found = {name: tensor.movedim(axis, 0) if axis else tensor for name, (tensor, axis) in held.items()}
        return next(iter(found.values())) if self.bare else tuple(found.values()) if self.row else found


@dataclass(frozen=True)
class OneCall:
    """The call of one module as a function of the LightningModule and of the tensors that have one row per sample."""

    name: str  # dotted name of the module
    given: Given  # what entered it when it was observed
    output: OutputPlace

    def __call__(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """Call the module and return the outputs, (n, ...).

        Args:
            module: The LightningModule.
            inputs: What it is given, by name, by position, or the one tensor.
        """
        rows = inputs if isinstance(inputs, tuple) else (inputs,)
        named: Mapping[str, Any] = (
            inputs if isinstance(inputs, Mapping) else dict(zip(self.given.samples, rows, strict=True))
        )
        like = next((each for each in module.parameters() if each.is_floating_point()), None)
        args, kwargs = self.given.filled(named, like)
        result = module.get_submodule(self.name)(*args, **kwargs)
        return self.output.rows(at(result, self.output.place), len(next(iter(named.values()))))
