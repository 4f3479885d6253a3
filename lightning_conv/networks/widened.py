"""``Widened``: the function that a network computes, in float64 wherever its forward asks for a narrower type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lightning_conv.networks.narrow_types import is_floating, is_narrow

WIDE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replace the narrower types that operators are asked for, or take by default, by float64.

    A forward that says ``x.float()`` and multiplies by weights in float64 fails. Inside this mode it computes what it says but for
    the roundings to the narrower type, forward and backward, so that these can be measured. It is of no use for
    certified numbers: the network that runs is the one with the casts.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator on wide numbers."""
        wide = tree_map(_wide, (args, dict(kwargs or {})))
        return tree_map(_wide, func(*wide[0], **wide[1]))


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return WIDE.get(value, value)
    known = isinstance(value, Tensor) and is_floating(value) and is_narrow(value) and value.dtype in WIDE
    return value.to(WIDE[value.dtype]) if known else value
