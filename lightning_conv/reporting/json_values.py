"""Numbers as JSON: ``json_values``."""

import math
from collections.abc import Mapping
from typing import Any


def json_values(value: Any) -> Any:
    """Return a value in the types of JSON, which has neither infinity nor NaN: they become None.

    Args:
        value: numbers, strings, tensors and arrays (which become lists), in mappings, lists and tuples of any depth.

    Raises:
        TypeError: the value has a type that cannot be written as JSON.

    Example:
        >>> json_values({"rank": (3, float("nan"))})
        {'rank': [3, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(each) for each in value]
    if hasattr(value, "tolist"):
        return json_values(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
