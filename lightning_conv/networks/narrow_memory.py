"""What ``NarrowWatch`` knows about memory: what watched operators wrote, and what is handed to code outside of torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_conv.networks.narrow_types import is_floating, storage_of

BLANK = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_permuted",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)
"""Operators that allocate memory and write nothing into it."""

FILLED = frozenset(
    f"aten::{new}{kind}{like}"
    for kind in ("zeros", "ones", "full")
    for new, like in (("", ""), ("", "_like"), ("new_", ""))
)
"""Operators that allocate memory and write one number into it."""

READERS = frozenset(
    getattr(Tensor, name)
    for name in (
        "numpy",
        "__array__",
        "__dlpack__",
        "apply_",
        "map_",
        "map2_",
        "data_ptr",
        "storage",
        "untyped_storage",
    )
)
"""Methods that hand the numbers to code outside of torch, which may change them where they are."""


class Memory:
    """Who wrote the numbers of each storage.

    Three signs tell of a writer that was not watched, such as another thread or NumPy: memory that was allocated and not written to is
    read; memory that was filled with one number has others; the counter of writes in place that autograd keeps (``Tensor._version``) has
    moved without an operator, in memory that an operator made.

    Storages go by the address of ``StorageWeakRef``; who uses this keeps those references, so that no address is used again.
    """

    def __init__(self) -> None:
        self._blank: dict[int, bool] = {}  # allocated only, by whether one number was written to all of it
        # Largest number of writes that the counter may have. Only of what was made while watching: older memory may have several.
        self._writes: dict[int, int] = {}

    def unseen(self, tensor: Tensor) -> bool:
        """Return whether an operator that reads the tensor reads floating numbers that no watched operator wrote."""
        key, writes = storage_of(tensor), _writes(tensor)
        if key is None or not is_floating(tensor) or not tensor.numel():
            return False
        moved = writes > self._writes.get(key.cdata, writes)
        if moved:
            self._writes[key.cdata] = writes
        filled = self._blank.get(key.cdata)
        return moved or filled is False or (filled is True and bool((tensor != tensor.flatten()[0]).any()))

    def note(self, name: str, given: Sequence[Tensor], made: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Note what the operator ``name`` was given, what it returned, and what it has just written in place."""
        for tensor in written:
            if (key := storage_of(tensor)) is not None:
                self._blank.pop(key.cdata, None)
                # Autograd counts the write when the operator has returned to it.
                if key.cdata in self._writes:
                    self._writes[key.cdata] = max(_writes(tensor) + 1, self._writes[key.cdata])
        older = {key.cdata for key in map(storage_of, given) if key is not None}
        for tensor in made:
            if (key := storage_of(tensor)) is not None and key.cdata not in older:
                self._writes.setdefault(key.cdata, _writes(tensor))
                if name in BLANK or name in FILLED:
                    self._blank[key.cdata] = name in FILLED

    def forget(self, kept: Mapping[int, object]) -> None:
        """Forget the storages that are not in ``kept``."""
        self._blank = {address: filled for address, filled in self._blank.items() if address in kept}
        self._writes = {address: count for address, count in self._writes.items() if address in kept}


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Readers(TorchFunctionMode):
    """Tells of reads that the dispatcher does not see: calls ``report`` with the tensor and the name of the method.

    Args:
        report: called with them.
        functions: the methods.
    """

    def __init__(self, report: Callable[[Tensor, str], None], functions: Collection[Any] = READERS) -> None:
        super().__init__()
        self._report, self._functions = report, functions

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Report a reader, and run the function."""
        if func in self._functions and args and isinstance(args[0], Tensor):
            with torch._C.DisableTorchFunction():
                self._report(args[0], f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))
