"""Checks of arguments: an error names the argument, what it was, and what to pass instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

LONG = 60
"""Characters of a value from which on a message shows its type alone."""

SEEDS = range(-(2**63), 2**64)
"""Seeds that a ``torch.Generator`` takes."""


def require_option(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not one of those allowed.

    Args:
        name: of the argument.
        value: what was given.
        allowed: the values.

    Raises:
        ValueError: it is not; the message lists the allowed values.
    """
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, allowed))}")


def require_type(name: str, value: object, kinds: type | tuple[Any, ...], need: str) -> None:
    """Refuse a value of another type.

    Args:
        name: of the argument.
        value: what was given.
        kinds: types that it may have.
        need: what to pass, in words.

    Raises:
        TypeError: it has none of them.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name}: {described(value)}; need {need}")


def require_callable(name: str, value: object, need: str) -> None:
    """Refuse what cannot be called.

    Args:
        name: of the argument.
        value: what was given.
        need: what to pass, in words.

    Raises:
        TypeError: it cannot.
    """
    if not callable(value):
        raise TypeError(f"{name}: {described(value)} cannot be called; need {need}")


def require_number(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf, finite: bool = True
) -> None:
    """Refuse what is no number, or one outside an interval; NaN is in none.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest number that is allowed.
        above: what it has to be above.
        finite: whether infinity is refused.

    Raises:
        TypeError: it is no real number, such as a string, a tensor or None.
        ValueError: it is another number.
    """
    bounds = [f"of at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    need = " ".join(["a finite number" if finite else "a number", *bounds])
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {described(value)}; need {need}")
    number = float(value)
    if math.isnan(number) or number < least or not number > above or (finite and math.isinf(number)):
        raise ValueError(f"{name}: {value}; need {need}")


def require_whole(name: str, value: object, *, least: int) -> None:
    """Refuse what is no whole number, or a smaller one.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest number that is allowed.

    Raises:
        TypeError: it is no whole number, such as a string, 1.5 or None.
        ValueError: it is smaller.
    """
    need = f"a whole number of at least {least}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: {described(value)}; need {need}")
    if int(value) < least:
        raise ValueError(f"{name}: {value}; need {need}")


def require_truth(name: str, value: object) -> None:
    """Refuse what is neither True nor False: any other value would count as one of them unnoticed.

    Args:
        name: of the argument.
        value: what was given.

    Raises:
        TypeError: it is neither.
    """
    require_type(name, value, bool, "True or False")


def require_seed(value: object) -> None:
    """Refuse a seed that is no whole number, or that a ``torch.Generator`` does not take.

    Args:
        value: the argument ``seed``.

    Raises:
        TypeError: it is no whole number.
        ValueError: it has more than 64 bits.
    """
    if not isinstance(value, Integral):
        raise TypeError(f"seed: {described(value)}; need a whole number, such as 0")
    if int(value) not in SEEDS:
        raise ValueError(f"seed: {value}; need a whole number of at most 64 bits, such as 0")


def described(value: object) -> str:
    """Return a value with its type in words, for a message.

    Args:
        value: anything.

    Example:
        >>> described("a"), described(None), described(dict)
        ("'a' (str)", 'None', 'the class dict')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    shown = repr(value)
    kind = type(value).__name__
    return f"{shown} ({kind})" if len(shown) < LONG and "\n" not in shown else f"an object of the type {kind}"
