"""Whether a call with a wrong value ends as it should: with a result, or with one error that names the argument and the value."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

CLEAR = (ValueError, TypeError, OSError, MemoryError, NotImplementedError)
"""Types of errors that say that an argument is wrong; also ``MisconfigurationException`` and errors of this project."""


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    how: Literal["result", "clear", "unclear"]
    said: str = ""


def described(value: object) -> list[str]:
    """Return words of which one should be in an error about a value."""
    words = [type(value).__name__]
    if isinstance(value, Tensor):
        words += [str(value.dtype), "NaN", "nan", "finite", "not a matrix", "complex", "sparse", "nested", "meta"]
        words += (
            ["quanti", "row", "sample", str(value)[:30]]
            if not value.is_meta and value.numel() < 5
            else ["quanti", "row", "sample"]
        )
        if not value.is_nested:
            words += [str(tuple(value.shape)), str(list(value.shape))]
        return words
    if isinstance(value, nn.Module):
        return [*words, "initiali", "parameter", "returned", "meta", "float16", "complex", "output", "random"]
    if isinstance(value, type):
        return [*words, value.__name__]
    if isinstance(value, (list, tuple, dict, set)):
        words += [type(each).__name__ for each in (value.values() if isinstance(value, dict) else value)]
        words += [] if value else ["empty", "no ", "none", "[]", "nothing"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words += [repr(value)[:30], str(value)[:30]]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        words += [f"{value:g}", f"{value:,}"]
    if isinstance(value, (np.generic, np.ndarray)):
        words += ["numpy", str(getattr(value, "dtype", ""))]
    if callable(value):
        words += ["returned", "function", "callable", "raised"]
    return [word for word in words if word]


def judged(name: str, value: object, error: BaseException) -> Ended:
    """Judge an error about an argument.

    An error that the user's own function or forward raises is left as it is, and clear.
    """
    said = f"{type(error).__name__}: {error}"
    kind = isinstance(error, CLEAR) or type(error).__module__.startswith(("lightning", "lightning_conv"))
    if isinstance(error, ZeroDivisionError) and callable(value):
        return Ended("clear", said)
    names = re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", str(error)) is not None
    notes = " ".join(getattr(error, "__notes__", ()))
    if isinstance(value, (nn.Module, Tensor)) and "samples" in notes:
        return Ended("clear", said)  # the forward's own error, with a note of what it was called on
    words = described(value)
    return Ended("clear" if kind and names and any(word in str(error) for word in words) else "unclear", said)


def call(function, arguments: dict[str, object], name: str, value: object) -> Ended:
    """Call a function with one argument replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            function(**{**arguments, name: value})
        except Exception as error:
            return judged(name, value, error)
    return Ended("result")
