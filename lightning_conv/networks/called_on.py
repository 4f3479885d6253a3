"""``called_on``: an error of a module's own forward says on which samples it was called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, input_tensors

OF_TORCH = (RuntimeError, NotImplementedError, IndexError)
"""What torch raises for samples of another type or shape; this package raises other types."""


@contextmanager
def called_on(name: str, inputs: Inputs) -> Iterator[None]:
    """Add a note with the samples to an error of the module's own forward, which stays what it is.

    Args:
        name: Of the module's class.
        inputs: The samples on which it is called.
    """
    try:
        yield
    except OF_TORCH as error:
        called = any(frame.f_code is StatelessModule.call.__code__ for frame, _ in walk_tb(error.__traceback__))
        if called and type(error) in OF_TORCH:
            shapes = ", ".join(f"{tuple(each.shape)} of {each.dtype}" for each in input_tensors(inputs))
            error.add_note(f"inputs: {name} was called on samples of {shapes}; pass what its forward takes")
        raise
