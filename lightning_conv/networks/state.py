"""``Kept``: the attributes of a module's copy, put back before each call if a forward writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_conv.networks.aside import aside
from lightning_conv.networks.copying import HOOKS, TORCH, Copy, held_tensors, not_copied, same, with_own_functions
from lightning_conv.networks.equal_numbers import equal_numbers

TENSORS = ("_parameters", "_buffers")
"""Attributes of a module whose values are replaced in every call."""


class Kept:
    """The attributes of a copy as they are in the original: counters, hidden states, lists, metrics.

    Args:
        made: the copy.
    """

    def __init__(self, made: Copy) -> None:
        self._made = made
        # What was not copied, or cannot change in place, is put back as it is.
        self._shared = [{n for n in _names(mine) if vars(mine)[n] is vars(its).get(n)} for mine, its in made.pairs]
        self.take_structure()

    def take_structure(self) -> None:
        """Take the present submodules, names of tensors and hooks of the copy for those that it is to have."""
        kinds = ("_modules", *TENSORS, *HOOKS)
        self._structure = [
            {kind: dict(vars(its)[kind]) for kind in kinds if kind in vars(its)} for _, its in self._made.pairs
        ]

    def changed(self) -> bool:
        """Return whether a forward has changed an attribute of the copy, or may have."""
        memo = dict(self._made.memo)
        for (mine, its), structure in zip(self._made.pairs, self._structure, strict=True):
            if any(vars(its)[kind].keys() != kept.keys() for kind, kept in structure.items()):
                return True
            names = _names(mine)
            if set(names) != set(_names(its)) or not all(same(vars(mine)[n], vars(its)[n], memo) for n in names):
                return True
        return False

    def restore(self) -> None:
        """Give the copy attributes as the original has them."""
        with aside():  # a forward may be recorded or transformed meanwhile
            self._restore()

    def _restore(self) -> None:
        memo = not_copied(self._made.original) | self._made.memo
        every = zip(self._made.pairs, self._structure, self._shared, strict=True)
        for (mine, its), structure, shared in every:
            for kind, kept in structure.items():
                if list(vars(its)[kind]) != list(kept):
                    vars(its)[kind].clear()
                    vars(its)[kind].update(kept)
            for name in set(_names(its)) - set(_names(mine)):
                del vars(its)[name]
            for name in _names(mine):
                value = vars(mine)[name]
                vars(its)[name] = value if name in shared else _copied(value, memo)


def _names(module: nn.Module) -> list[str]:
    """Return the names of its attributes, without those of ``nn.Module`` itself."""
    return [name for name in vars(module) if name not in _OWN]


_OWN = TORCH - {"_is_full_backward_hook"}


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    return with_own_functions(copy.deepcopy(value, memo), memo)


@contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put the attributes of a module itself back afterwards; the function that is provided does so at any time.

    Attributes are set to the objects that they were. Lists, dictionaries, sets and tensors among them get their contents back.
    What other objects hold inside is not known.

    Yields:
        That function.
    """
    kinds = ("_modules", *TENSORS, *HOOKS)
    kept = [
        (each, dict(vars(each)), {kind: dict(vars(each)[kind]) for kind in kinds if kind in vars(each)})
        for each in model.modules()
    ]
    contents = [
        (value, copy.copy(value)) for _, own_values, _ in kept for value in own_values.values() if _is_container(value)
    ]
    numbers = [(value, value.detach().clone()) for value in held_tensors(model)]

    def put_back() -> None:
        for each, own_values, structure in kept:
            for name in set(vars(each)) - set(own_values):
                del vars(each)[name]
            training = each.training
            vars(each).update(own_values)
            each.training = training
            for kind, of_kind in structure.items():
                if list(vars(each)[kind].items()) != list(of_kind.items()):
                    vars(each)[kind].clear()
                    vars(each)[kind].update(of_kind)
        for value, content in contents:
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)
        with torch.no_grad():
            for tensor, before in numbers:
                if not equal_numbers(tensor.detach(), before):
                    tensor.data.copy_(before)

    try:
        yield put_back
    finally:
        put_back()


def _is_container(value: Any) -> bool:
    return type(value) in (list, dict, set)
