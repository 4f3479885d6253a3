"""``Replay``: observed code as a network, a module whose forward takes the samples and returns the outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.networks.copying import TORCH
from lightning_conv.networks.observed.draws import Draws
from lightning_conv.networks.observed.leaves import Place, at, with_part, with_tensors
from lightning_conv.networks.observed.sample_lists import as_list, as_rows


@dataclass(frozen=True)
class OutputPlace:
    """Where one of the outputs stands: which call, what of its result, and along which axis its samples are."""

    name: str  # dotted name of the module
    number: int  # of its calls
    place: Place
    axis: int = 0
    ndim: int = 2  # of the tensor
    several: bool = False  # whether a sample has several rows, which follow one another
    rest: tuple[int, ...] = ()  # shape of a sample's outputs; empty: one number, or not known
    padded: int = 0  # number of outputs, up to which zeros are added, where there is a call for each sample; 0: one call has all of them

    def calls(self, samples: int) -> list[tuple[str, int]]:
        """Return name and number of the calls that have the outputs of so many samples."""
        return [(self.name, number) for number in (range(samples) if self.padded else [self.number])]

    def rows(self, tensor: Tensor, samples: int) -> Tensor:
        """Return the tensor with one row per sample, (samples, ...); several rows of a sample that follow one another are one.

        Args:
            tensor: What stands there in one of the calls.
            samples: Number of samples that it has.
        """
        if self.padded:
            return nn.functional.pad(tensor.reshape(1, -1), (0, self.padded - tensor.numel()))
        along = self.axis if tensor.ndim == self.ndim else 0
        moved = tensor.movedim(along, 0)
        keeps = self.rest and tensor.numel() == samples * math.prod(self.rest)
        return moved.reshape(samples, *(self.rest if keeps else (-1,)))


@dataclass(frozen=True)
class Given:
    """The structure that the code gets, of which some tensors have one row per sample.

    Args:
        structure: What was given when the code was observed.
        samples: Places of the tensors with samples, by the names under which the network takes them.
        axes: The axis of the samples by place; 0 where none is named.
        lists: Places of lists with one entry per sample, which may have several shapes, by the names under which the network takes them.
    """

    structure: Any
    samples: Mapping[str, Place]
    axes: Mapping[Place, int] = field(default_factory=dict)
    lists: Mapping[str, Place] = field(default_factory=dict)

    def inputs(self) -> dict[str, Tensor]:
        """Return the tensors with samples, (n, ...), by name; those of lists are padded, with their shapes beside them."""
        found = {
            name: at(self.structure, place).detach().movedim(self.axes.get(place, 0), 0)
            for name, place in self.samples.items()
        }
        for name, place in self.lists.items():
            found |= as_rows(at(self.structure, place), name)
        return found

    def filled(self, inputs: Mapping[str, Tensor], like: Tensor | None) -> Any:
        """Return the structure with these samples; floating constants come in the type of ``like``."""
        named = {place: name for name, place in self.samples.items()}

        def other(place: Place, tensor: Tensor) -> Tensor:
            if place in named:
                return inputs[named[place]].movedim(0, self.axes.get(place, 0))
            return as_type(tensor, like)

        structure = with_tensors(self.structure, other)
        for name, place in self.lists.items():
            structure = with_part(structure, place, as_list(at(self.structure, place), name, inputs))
        return structure


class Replay(nn.Module):
    """Observed code as a function of its samples: runs it again, with what it drew, and returns the outputs that were found.

    The parameters have the names that they have in ``model``, whose dictionaries this module shares; so whatever replaces them here, as
    ``torch.func.functional_call`` does, replaces them for the code.

    Args:
        model: The module that the code calls, or whose parts it calls.
        code: Called with ``model`` and what was given. A function that holds neither: in a copy of this network it is called with a copy
            of the model.
        given: What it is called with.
        outputs: What of its calls to return, side by side.
        draws: The random numbers that it drew, of which those named in ``drawn`` have one row per sample.
        drawn: Names of inputs by the number of the draw.
    """

    def __init__(
        self,
        model: nn.Module,
        code: Callable[[Any, Any], object],
        given: Given,
        outputs: Sequence[OutputPlace],
        draws: Sequence[Tensor] = (),
        drawn: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__ |= {name: vars(model)[name] for name in ("_modules", "_parameters", "_buffers")}
        self.training = model.training
        # In a tuple, for a module among the attributes would become a part of this one.
        self._held = (model, code)
        self._given, self._outputs = given, tuple(outputs)
        self._draws, self._drawn = list(draws), dict(drawn or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Replay:
        """Return the network over a copy of the model, which shares that copy's dictionaries in turn."""
        model, code = self._held
        copied = copy.deepcopy(model, memo)
        for name, value in vars(model).items():
            if vars(copied).get(name) is None:  # left out by the model's own way to be copied
                vars(copied)[name] = value
        made = Replay(copied, code, self._given, self._outputs, self._draws, self._drawn)
        memo[id(self)] = made
        return made

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the outputs, (n, ...); of several places side by side, each flattened, (n, C).

        Args:
            *args: The tensors with samples, in their order.
            **kwargs: The tensors with samples, by name.

        Raises:
            LookupError: The code does not make a call that it has made when it was observed.
        """
        model, code = self._held
        samples = dict(zip(self._given.samples, args, strict=False)) | kwargs
        count = len(next(iter(samples.values())))
        like = next((each for each in model.parameters() if each.is_floating_point()), None)
        catch = _Catch(model, {call for each in self._outputs for call in each.calls(count)})
        draws = [
            samples[self._drawn[number]] if number in self._drawn else as_type(each, like)
            for number, each in enumerate(self._draws)
        ]
        attributes, contents = dict(vars(model)), _contents(model)
        if like is not None and isinstance(attributes.get("_dtype"), torch.dtype):
            vars(model)["_dtype"] = like.dtype  # of a LightningModule's ``self.dtype``
        with catch, Draws(draws).replaying() if draws else nullcontext():
            try:
                code(model, self._given.filled(samples, like))
            except _CaughtAll:
                pass
            finally:
                vars(model).clear()
                vars(model).update(attributes)  # a state that the code carries from one call to the next
                for value, before in contents:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(before)
        rows = [
            torch.cat([each.rows(catch.found(call, each.place), count) for call in each.calls(count)])
            for each in self._outputs
        ]
        return rows[0] if len(rows) == 1 else torch.cat([each.flatten(1) for each in rows], 1)


def _contents(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return the lists, dictionaries and sets that the code may write to, with copies: attributes of the modules, not what these are of."""
    values = [value for each in model.modules() for name, value in vars(each).items() if name not in TORCH]
    return [(value, copy.copy(value)) for value in values if type(value) in (list, dict, set)]


def as_type(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return a constant as the parameters are: on their device and, if floating, of their type.

    Args:
        tensor: The constant.
        like: One of the parameters; None: the constant stays as it is.
    """
    if like is None:
        return tensor
    return tensor.to(like.device, like.dtype) if tensor.is_floating_point() else tensor.to(like.device)


class _CaughtAll(BaseException):
    """All outputs have been returned; what the code does with them is not of interest."""


class _Catch:
    """Keeps what some calls return, and ends the code when the last of them has."""

    def __init__(self, model: nn.Module, wanted: Set[tuple[str, int]]) -> None:
        self._model = model
        self._wanted = wanted
        self._results: dict[tuple[str, int], Any] = {}
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name in {name for name, _ in self._wanted}:
            module = self._model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._keep(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            call = name, self._counts.get(name, 0)
            self._counts[name] = call[1] + 1
            if call in self._wanted:
                self._results[call] = output
                if len(self._results) == len(self._wanted):
                    raise _CaughtAll

        return keep

    def found(self, call: tuple[str, int], place: Place) -> Tensor:
        result = self._results.get(call)
        if result is None:
            raise LookupError(f"the step does not call {call[0] or 'the module'!r} as it did when it was observed")
        tensor: Tensor = at(result, place)
        return tensor
