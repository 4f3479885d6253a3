"""Activation checkpointing, switched off for a while: ``no_recomputation``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.utils import checkpoint


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Keep the activations of forwards inside this context, also inside ``torch.utils.checkpoint``.

    A checkpoint runs its part of the network again in the backward pass. By then the parameters, buffers and modes of an
    evaluation are no longer in place. The backward pass would differentiate another function, or read the model's own
    running statistics, without an error. Checkpoints also do not support forward mode and vmap.
    """
    replacements = {"CheckpointFunction": _Direct, "_checkpoint_hook": _kept}
    before = {name: getattr(checkpoint, name) for name in replacements if hasattr(checkpoint, name)}
    try:
        for name in before:
            setattr(checkpoint, name, replacements[name])
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)


class _Direct:
    """Stand-in for ``CheckpointFunction`` (``use_reentrant=True``)."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        del preserve_rng_state
        return function(*args)


def _kept(frame: object) -> nullcontext[None]:
    """Replace the saved-tensor hooks that drop activations (``use_reentrant=False``)."""
    del frame
    return nullcontext()
