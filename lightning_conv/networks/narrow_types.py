"""What ``NarrowWatch`` asks about tensors and operators: is a type narrow, did an operator round, whose memory is it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map


def rounds(func: Any, given: tuple[Any, Any], made: Sequence[Tensor]) -> bool:
    """Return whether the results are not those of the same operator on the same numbers in float64.

    Args:
        func: the operator.
        given: its positional and keyword arguments, as they were before it ran.
        made: its results.
    """
    if torch.Tag.nondeterministic_seeded in func.tags:  # calling it again would move the generator
        return True
    for convert in (_widened, _all_widened):
        wide = tree_map(convert, given)
        try:
            result = func(*wide[0], **wide[1])
            again = tensors_in(result) or tensors_in(wide)
            if any(is_narrow(tensor) for tensor in again):
                continue  # integers that are divided give the default type
            return len(made) != len(again) or not all(map(_same, made, again))
        except (RuntimeError, TypeError, ValueError, IndexError):  # no such operator in float64: nothing is shown
            return True
    return True


def _same(narrow: Tensor, wide: Tensor) -> bool:
    if narrow.shape != wide.shape:
        return False
    narrow, wide = _strided(_widened(narrow)), _strided(wide)
    return bool(((narrow == wide) | ((narrow != narrow) & (wide != wide))).all())


def _widened(value: Any) -> Any:
    """Return a narrow tensor, or the name of a narrow type, in float64 or complex128; anything else as it is."""
    if isinstance(value, torch.dtype):
        return _wide(value) if value.is_floating_point or value.is_complex else value
    return _dense(value).to(_wide(value.dtype)) if isinstance(value, Tensor) and is_narrow(value) else value


def _all_widened(value: Any) -> Any:
    integers = isinstance(value, Tensor) and not is_floating(value)
    return value.to(torch.float64) if integers else _widened(value)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


def _strided(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def copied(value: Any) -> Any:
    """Return a copy of a narrow tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and is_narrow(value) else value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def is_floating(tensor: Tensor) -> bool:
    """Return whether the numbers are real or complex ones that may be rounded."""
    return tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized


def is_narrow(tensor: Tensor) -> bool:
    """Return whether they have fewer bits than float64."""
    return is_floating(tensor) and tensor.dtype not in (torch.float64, torch.complex128)


def bits_of(dtype: torch.dtype) -> int:
    """Return the bits of a floating type, of one part of a complex one; 0 for any other type."""
    known = dtype.is_floating_point or dtype.is_complex
    return torch.finfo(dtype.to_real() if dtype.is_complex else dtype).bits if known else 0


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operator, which are in lists, tuples and dicts if at all."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes in place; none where its schema is not known."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip((each.name for each in schema.arguments), args, strict=False)) | dict(kwargs)
    names = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return tensors_in([given.get(name) for name in names])


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """Return the memory that the numbers are in; None: they have none of their own (sparse ones)."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None


def digest_of(tensor: Tensor) -> str:
    """Return a text that tells the numbers and the shape of a tensor from others."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else _dense(tensor).resolve_neg()
    raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest() + str(tuple(tensor.shape))
