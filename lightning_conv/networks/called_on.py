"""``called_on``: samples on which a module cannot be called are named as the cause of what fails there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

import torch

from lightning_conv.networks.inputs import Inputs, input_tensors

OWN = str(Path(__file__).parent.parent)
"""Folder of this package, whose own errors say what to do."""


@contextmanager
def called_on(name: str, inputs: Inputs, call: Callable[[], object]) -> Iterator[None]:
    """Name the samples as the cause of an error of the block, where the module alone fails on them in the same way.

    Args:
        name: Of the module's class.
        inputs: Its samples.
        call: Calls it on them.

    Raises:
        ValueError: The module cannot be called on the samples.

    Cost: a forward, after an error only.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or not _fails_alike(call, error):
            raise
        shapes = ", ".join(f"{tuple(each.shape)} of {each.dtype}" for each in input_tensors(inputs))
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"inputs: {name} cannot be called on {shapes} ({said}); pass what its forward takes"
        ) from error


def _fails_alike(call: Callable[[], object], error: Exception) -> bool:
    """Return whether the module by itself raises this error."""
    try:
        with torch.no_grad():
            call()
    except Exception as own:
        *_, (frame, _) = walk_tb(own.__traceback__)
        return type(own) is type(error) and not frame.f_code.co_filename.startswith(OWN)
    return False
