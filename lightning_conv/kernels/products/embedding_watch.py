"""``EmbeddingWatch``: whether a forward looks up words in a way whose gradient is not the derivative of the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class EmbeddingWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Look at the calls of ``torch.embedding`` inside whose table gets a gradient.

    The backward of an embedding leaves out the row of its padding, and can divide by the frequency of words in the batch; its forward
    derivative does neither. What a call asks for is seen whether or not these words are among the inputs. Bags of words have no
    forward derivative at all.

    Attributes:
        padded: whether one has a ``padding_idx``.
        by_frequency: whether one has ``scale_grad_by_freq``.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.padded = self.by_frequency = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "overloadpacket", None) is torch.ops.aten.embedding and args[0].requires_grad:
            asked = dict(zip(("weight", "indices", "padding_idx", "scale_grad_by_freq"), args, strict=False))
            asked |= kwargs or {}
            self.padded |= asked.get("padding_idx", -1) >= 0
            self.by_frequency |= bool(asked.get("scale_grad_by_freq", False))
        return func(*args, **(kwargs or {}))
