"""``until_sigterm``: leave a block at once when the process is asked to end, so that Lightning ends the run in its own way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def until_sigterm(trainer: pl.Trainer) -> Iterator[None]:
    """Leave the block when SIGTERM arrives, whatever it does; everything that it has changed is put back as after an error.

    Lightning notes the signal and ends the run after the next batch. A block that takes long would keep it from doing so. Here
    the handlers that are installed are called first, so that Lightning and a cluster's own handler know of the signal. The caller goes on,
    without what the block was for; ``trainer.received_sigterm`` tells.

    Args:
        trainer: Trainer of the run.

    Raises:
        SIGTERMException: Somebody else raised it, without a signal.
    """
    before = signal.getsignal(signal.SIGTERM)
    # Handlers can be set in the main thread alone, and what is not callable is not Lightning's.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        before(number, frame)
        signal.signal(signal.SIGTERM, before)  # a second signal must not interrupt what is put back
        if trainer.received_sigterm:
            raise SIGTERMException

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except SIGTERMException:
        if not trainer.received_sigterm:
            raise
    finally:
        if signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, before)
