"""``QuietHook``: a hook that a copy of its module, or a file, does not take along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch


class QuietHook:
    """Calls a method for as long as its object lives.

    A bound method as a hook would make ``copy.deepcopy(module)`` and ``torch.save(module)`` take along all that its object holds: the
    trainer, loaders, and what cannot be copied. In a copy and in a file there is a hook that does nothing.

    Args:
        method: A bound method.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = WeakMethod(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method. While code is compiled nothing is done, so that compiled code has no part of it."""
        if torch.compiler.is_compiling():
            return None
        method = self._method()
        return None if method is None else method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """Return a hook that does nothing."""
        return nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """Pickle as a hook that does nothing."""
        return _of_a_file, ()


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


def _of_a_file() -> Callable[..., None]:
    return nothing
