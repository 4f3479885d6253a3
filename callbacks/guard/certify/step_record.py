"""``BatchRecord``: a batch of the run as it was when its step began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_conv.callbacks.guard.certify.features_compared import Expected
from lightning_conv.callbacks.run.sample_keys import tensors_of


@dataclass(frozen=True)
class BatchRecord:
    """What is remembered of a batch, to see whether anything changes it."""

    calls: int  # of the head since the last step, at its start
    expected: Expected | None
    tensors: list[tuple[Tensor, int]]  # those of the batch, with the number of writes in place that they have seen
    batch: Any

    @classmethod
    def of(cls, batch: Any, expected: Expected | None, calls: int) -> BatchRecord:
        """Remember a batch.

        Args:
            batch: The batch that the training step is about to see.
            expected: The features that its samples must have; None: they are not known.
            calls: Number of calls of the head since the last step.
        """
        return cls(calls, expected, _versions(batch), batch)

    def was_changed(self) -> bool:
        """Return whether a tensor of the batch was written to, or is another one."""
        now = _versions(self.batch)
        return len(now) != len(self.tensors) or any(
            a is not b or before != after for (a, before), (b, after) in zip(self.tensors, now, strict=True)
        )


def _versions(batch: Any) -> list[tuple[Tensor, int]]:
    return [(each, 0 if each.is_inference() else each._version) for each in tensors_of(batch)]
