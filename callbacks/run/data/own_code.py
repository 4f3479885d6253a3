"""``own_code``: whether reading a sample runs code that is not torch's, which may count, cache or draw."""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

LIBRARIES = ("torch", "torchvision")
"""Packages whose data sets, transforms and collate functions keep nothing between two reads but generators."""

DEPTH = 6
"""Levels of a data set that are looked into."""

LOOKED_AT = 1024
"""Entries of a list that are looked at; what follows is taken to be like them."""


def own_code(*readers: Any) -> str:
    """Return the name of the code of a user's own that reading runs; empty if there is none.

    Only code of torch and torchvision, and plain numbers, tensors and arrays, are known to leave a run alone however often they are read.

    Args:
        *readers: A data set, a collate function.
    """
    return next((name for each in readers if (name := _own(each, 0))), "")


def _own(part: Any, depth: int) -> str:
    if part is None or isinstance(part, (str, bytes, bool, int, float, complex, Tensor, np.ndarray, np.generic, range)):
        return (
            "" if type(part).__module__.partition(".")[0] in ("builtins", "numpy", *LIBRARIES) else _name_of(type(part))
        )
    if depth > DEPTH:
        return _name_of(type(part))
    if isinstance(part, (types.FunctionType, types.BuiltinFunctionType, type)):
        known = (part.__module__ or "").partition(".")[0] in ("builtins", *LIBRARIES)
        return "" if known else _name_of(part)
    if type(part) in (list, tuple, set, frozenset):
        return next((name for each in islice(part, LOOKED_AT) if (name := _own(each, depth + 1))), "")
    if type(part) in (dict, OrderedDict, defaultdict):
        return next((name for each in islice(part.values(), LOOKED_AT) if (name := _own(each, depth + 1))), "")
    if type(part).__module__.partition(".")[0] not in LIBRARIES:
        return _name_of(type(part))
    held: Mapping[str, Any] = getattr(part, "__dict__", {})
    return next((name for each in held.values() if (name := _own(each, depth + 1))), "")


def _name_of(code: Any) -> str:
    return f"{getattr(code, '__module__', None) or 'a module'}.{getattr(code, '__qualname__', type(code).__name__)}"
