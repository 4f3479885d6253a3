"""``measuring``: what surrounds a measurement in a run: it ends at once on SIGTERM, and garbage waits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl

from lightning_conv.callbacks.run.until_sigterm import until_sigterm

YOUNG = 100_000
"""New objects after which garbage is collected while something is measured; Python's own number is 700 or 2,000."""


@contextmanager
def measuring(trainer: pl.Trainer) -> Iterator[None]:
    """Measure in this block, see ``until_sigterm`` and ``rarely_collected``.

    Args:
        trainer: Trainer of the run.
    """
    with until_sigterm(trainer), rarely_collected():
        yield


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Look for cycles of objects seldom.

    A measurement makes tens of thousands of objects that are gone when it ends. Where they live through some collections meanwhile,
    Python takes them for old and looks at all objects of the process: 0.3 s where torch, torchvision and transformers are loaded.
    """
    before = gc.get_threshold()
    if not gc.isenabled() or before[0] == 0:
        yield
        return
    gc.set_threshold(max(before[0], YOUNG), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
