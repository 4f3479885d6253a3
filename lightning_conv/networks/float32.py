"""Float32 arithmetic in full precision for a while: ``full_float32``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.backends import cuda, cudnn, mkldnn

FULL = "none", "ieee"
"""Settings under which an operation multiplies float32 numbers as such."""


@dataclass(frozen=True)
class _Older:
    """One of the settings that torch had before 2.9: for all backends or all operations together."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    full: Any


def _allow_tf32(allow: bool) -> None:
    cudnn.allow_tf32 = allow


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 in matrix products, convolutions and recurrent layers; afterwards what the run has set.

    The relative error of a TF32 product is 2^-11, of a bfloat16 one 2^-9: bounds on rounding are for float32's own
    2^-24. Both of torch's interfaces are set, since it refuses to read one that contradicts the other, except an older
    one that the run has made unreadable by using the newer. What is full already is not touched.
    """
    older = (
        _Older(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _Older(lambda: cudnn.allow_tf32, _allow_tf32, False),
    )
    # Known to torch 2.9 and later, but not to its annotations.
    operations: tuple[Any, ...] = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)  # type: ignore[attr-defined]
    saved = [operation.fp32_precision for operation in operations]
    with ExitStack() as stack:
        # Undone in reverse order: the older interfaces first, whose writing sets some operations as well.
        for operation, precision in zip(operations, saved, strict=True):
            stack.callback(_restore, operation, precision)
        for setting in older:
            _make_full(setting, stack)
        for operation in operations:
            if operation.fp32_precision not in FULL:
                operation.fp32_precision = "ieee"
        yield


def _make_full(setting: _Older, stack: ExitStack) -> None:
    try:
        before = setting.read()
    except RuntimeError:  # the run has used the newer interface
        return
    if before != setting.full:
        stack.callback(setting.write, before)
        setting.write(setting.full)


def _restore(operation: Any, precision: str) -> None:
    if operation.fp32_precision == precision:
        return
    operation.fp32_precision = "none"  # follow the setting of the whole backend, as most do
    if operation.fp32_precision != precision:
        operation.fp32_precision = precision
