"""``isolated``: run code and put the generators of torch, Python and NumPy back afterwards, even after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def isolated() -> Iterator[None]:
    """Put the global generators of torch, every device, Python and NumPy back after the block, even after an error.

    Lightning's ``isolate_rng`` alone leaves them where an error found them.
    """
    states = isolate_rng()
    states.__enter__()
    try:
        yield
    finally:
        states.__exit__(None, None, None)
