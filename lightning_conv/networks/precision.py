"""Floating-point precision: float32 products without shortcuts (``full_float32``), and numbers in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda, cudnn, mkldnn

FULL = "none", "ieee"
"""Settings under which an operation multiplies float32 numbers without rounding them first."""


@dataclass(frozen=True)
class _Older:
    """A setting of torch's interface before 2.9, which covers all backends or all operations at once."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    full: Any


def _allow_tf32(allow: bool) -> None:
    cudnn.allow_tf32 = allow


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch off TF32 and bfloat16 in matrix products, convolutions and recurrent layers; restore the settings afterwards.

    The relative error of a TF32 product is 2^-11, that of a bfloat16 product 2^-9, while the rounding bounds here assume
    float32's own 2^-24. Both of torch's interfaces are set, because torch refuses to read one that contradicts the other.
    An older setting that the run has made unreadable by using the newer interface is left alone, and so is every setting
    that already has full precision.
    """
    older = (
        _Older(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _Older(lambda: cudnn.allow_tf32, _allow_tf32, False),
    )
    # Known to torch 2.9 and later, but not to its annotations.
    operations: tuple[Any, ...] = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)  # type: ignore[attr-defined]
    saved = [operation.fp32_precision for operation in operations]
    with ExitStack() as stack:
        # Undone in reverse order: the older interface first, because writing to it also sets some operations.
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
    except RuntimeError:  # the run uses the newer interface
        return
    if before != setting.full:
        stack.callback(setting.write, before)
        setting.write(setting.full)


def _restore(operation: Any, precision: str) -> None:
    if operation.fp32_precision == precision:
        return
    operation.fp32_precision = "none"  # follows the setting of the whole backend, which is the default
    if operation.fp32_precision != precision:
        operation.fp32_precision = precision


def product_roundoff(like: Tensor) -> float:
    """Return the relative rounding of a matrix product as torch computes it now: that of the type, of TF32 or of bfloat16.

    Args:
        like: a tensor of the type and on the device of the factors.
    """
    own = torch.finfo(like.dtype).eps / 2
    if like.dtype != torch.float32:
        return own
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # the run uses torch's newer interface
        allowed = "medium"
    tf32 = like.device.type == "cuda" and cuda.matmul.fp32_precision not in FULL
    return max(own, {"highest": own, "high": 2.0**-11}.get(allowed, 2.0**-8), 2.0**-11 if tf32 else own)


def in_float64(tensor: Tensor) -> Tensor:
    """Return the numbers in float64, without their graph; on the CPU where their device has no float64 (Apple's GPUs)."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
