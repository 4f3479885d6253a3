"""``checked``: arguments of a public function against their annotations, so that each mistake is one error that names it."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from lightning_conv.arguments import described, require_number, require_option, require_seed, require_whole

P = ParamSpec("P")
R = TypeVar("R")
Rule = Callable[[str, object], None]
"""Refuses an argument by name and value."""

INPUTS = (Tensor, tuple[Tensor, ...], Mapping[str, Tensor])
"""What samples may be."""
MOST = 1000
"""Members of a sequence that are looked at."""
WORDS: Mapping[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
    Tensor: "a tensor",
    nn.Module: "an nn.Module",
    torch.dtype: "a torch.dtype",
    Path: "a path",
}
KINDS: Mapping[object, tuple[type, ...]] = {int: (Integral,), float: (Real,), Path: (str, Path)}
"""What may be passed for a type, where that is not the type itself."""


def checked(**rules: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that refuses arguments of another type than their annotation, and those that a rule refuses.

    Whole numbers and numbers may be of NumPy; True and False are none. Tensors are dense, real and on a device that has numbers. A name
    in an annotation that only type checkers know is not looked at, nor is ``Any``.

    Args:
        rules: by the names of arguments: what is asked of them in place of the annotation, such as ``whole(1)``; None is left to that.

    Raises:
        TypeError: by the decorated function: an argument has another type; the message names it, the value and what to pass.
        ValueError: by the decorated function: it is not one of those allowed, or a rule says so.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            check_arguments(function, signature.bind(*args, **kwargs).arguments, **rules)
            return function(*args, **kwargs)

        return call

    return decorated


def check_arguments(function: Callable[..., object], given: Mapping[str, object], /, **rules: Rule) -> None:
    """Refuse arguments as ``checked`` does, inside a function that cannot be decorated, such as one that looks at its caller.

    Args:
        function: has the annotations.
        given: arguments by name, such as ``locals()`` in its first line; other names are not looked at.
        rules: see ``checked``.

    Raises:
        TypeError: see ``checked``.
        ValueError: see ``checked``.
    """
    parameters, hints = _parameters(function), _hints(function)
    for name, value in given.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if value is parameter.default:
            continue
        if name in rules and value is not None:
            rules[name](name, value)
        elif name in hints and not _fits(value, hints[name]):
            _refuse(name, value, hints[name])


def whole(least: int) -> Rule:
    """Return the rule of a whole number of at least ``least``."""
    return partial(require_whole, least=least)


def real(*, least: float = float("-inf"), above: float = float("-inf"), finite: bool = True) -> Rule:
    """Return the rule of a number; see ``require_number``."""
    return partial(require_number, least=least, above=above, finite=finite)


@cache
def _parameters(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


@cache
def _hints(function: Callable[..., object]) -> Mapping[str, object]:
    """Return the annotations of the arguments that can be resolved, without those of the result."""
    found: dict[str, object] = {}
    known = getattr(inspect.unwrap(function), "__globals__", {})
    for name, hint in inspect.get_annotations(function).items():
        try:
            found[name] = eval(hint, known) if isinstance(hint, str) else hint  # the project's own source
        except NameError:  # imported for type checkers only
            continue
    return found


def _fits(value: object, hint: object) -> bool:
    """Return whether a value has the type of an annotation, as far as it can be seen."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any or hint is object or isinstance(hint, (TypeVar, str)):
        return True
    if hint is None:
        return value is None
    if origin in (Union, types.UnionType):
        if set(INPUTS) <= set(inside) and isinstance(value, (Tensor, tuple, Mapping)):
            return True  # of any type; what reads samples looks at them
        return any(_fits(value, each) for each in inside)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inside if not isinstance(value, Tensor))
    if origin is not None:
        return _holds(value, origin, inside)
    if hint is int or hint is float:
        return isinstance(value, KINDS[hint]) and not isinstance(value, bool)
    if hint is Tensor:
        return isinstance(value, Tensor) and _flaw(value) == ""
    if typing.is_typeddict(hint) or not isinstance(hint, type):
        return True
    if getattr(hint, "_is_protocol", False):
        return not isinstance(value, type) and all(hasattr(value, each) for each in _members(hint))
    return isinstance(value, KINDS.get(hint, (hint,)))


def _holds(value: object, origin: object, inside: tuple[Any, ...]) -> bool:
    """Return whether a value is a container, or a function, of a generic annotation."""
    if origin is typing.Annotated:
        return _fits(value, inside[0])
    if not isinstance(origin, type):
        return True
    if not isinstance(value, origin) or (isinstance(value, (str, bytes, Tensor, np.ndarray)) and origin is not type):
        return False
    if issubclass(origin, Mapping) and isinstance(value, Mapping) and inside:
        return all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in list(value.items())[:MOST])
    if isinstance(value, (list, tuple)) and inside:
        if origin is tuple and Ellipsis not in inside:
            return len(value) == len(inside) and all(map(_fits, value, inside))
        return all(_fits(each, inside[0]) for each in value[:MOST])
    return True


def _members(protocol: type) -> list[str]:
    return [each for each in (*vars(protocol), *inspect.get_annotations(protocol)) if not each.startswith("_")]


def _flaw(tensor: Tensor) -> str:
    """Return what makes a tensor unusable as numbers; empty: nothing."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_meta:
        return "on the device meta, where it has no numbers"
    return "complex" if tensor.is_complex() else ""


def _refuse(name: str, value: object, hint: object) -> None:
    choices = [each for part in _parts(hint) if get_origin(part) is Literal for each in get_args(part)]
    if choices and isinstance(value, str):
        require_option(name, value, choices)
    need = " or ".join(dict.fromkeys(map(_words, _parts(hint))))
    if isinstance(value, Tensor) and (flaw := _flaw(value)):
        raise TypeError(
            f"{name}: a tensor that is {flaw}; need {need.replace('a tensor', 'a dense tensor of real numbers')}"
        )
    raise TypeError(f"{name}: {described(value)}; need {need}")


def _parts(hint: object) -> list[object]:
    if get_origin(hint) in (Union, types.UnionType):
        return [each for part in get_args(hint) for each in _parts(part)]
    return [hint]


def _words(hint: object) -> str:
    """Return an annotation in words."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(repr, inside))
    if origin is not None and isinstance(origin, type):
        if issubclass(origin, Callable):  # type: ignore[arg-type]
            return "a function"
        if issubclass(origin, Mapping):
            return f"a mapping of {_words(inside[0])} to {_words(inside[1])}"
        members = " and ".join(dict.fromkeys(_words(each) for each in inside if each is not Ellipsis))
        kind = "tuple" if origin is tuple else "sequence"
        return f"a {kind} whose members are each {members}" if members else f"a {kind}"
    if hint in WORDS:
        return WORDS[hint]
    return f"a {getattr(hint, '__name__', hint)}"


def _seed(name: str, value: object) -> None:
    del name
    require_seed(value)


SEED: Rule = _seed
"""The rule of a seed of a ``torch.Generator``."""
