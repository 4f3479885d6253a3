"""``isolated``: run code and put the generators of torch, Python and NumPy back afterwards; ``seed_all``: seed them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
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


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, from which data sets and training steps draw.

    Those of a device that nothing has used yet are left alone, other than by ``torch.manual_seed``: it notes the seed for the time when
    the device is first used, which nothing takes back, and a stack trace with it, which takes longer than a small step.

    Args:
        seed: The seed.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            device.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
