"""A folder in which a long certificate keeps its work, so that a run that is killed meanwhile can go on where it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_conv.machine.memory import mebibytes

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

NAME = "expressivity_certificate"


@contextmanager
def work_folder(root: str, need: int) -> Iterator[Path | None]:
    """Provide a folder under ``root`` to one process at a time; it is removed when the block ends and stays when the process is killed.

    Args:
        root: Default root directory of the trainer.
        need: Bytes that will be written.

    Yields:
        The folder; None, with a message, where there can be none: ``root`` is not local or not writable, there is too little room,
        another process works in it, or the system has no file locks.
    """
    place = Path(root) / NAME
    lock, why = _taken(root, place, need)
    if lock is None:
        rank_zero_info(f"ExpressivityGuard: a killed run will begin the certificate anew: {why}")
        yield None
        return
    try:
        yield place
    except Exception:  # not an interruption, so no later run will go on from here
        shutil.rmtree(place, ignore_errors=True)
        raise
    else:
        shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


def _taken(root: str, place: Path, need: int) -> tuple[int | None, str]:
    """Return the lock, or why there is none."""
    if "://" in root or fcntl is None:
        return None, f"{root!r} is not a local folder" if "://" in root else "the system has no file locks"
    lock = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in place.iterdir())
        free = shutil.disk_usage(place).free
        if need > there + free:
            shutil.rmtree(place, ignore_errors=True)
            return None, f"{place.parent} has {mebibytes(free)} free, and {mebibytes(need)} are needed"
        lock = os.open(place, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == place.stat().st_ino:  # not one that was removed meanwhile
            return lock, ""
        why = f"{place} was removed meanwhile"
    except BlockingIOError:
        why = f"another process is at work in {place}"
    except OSError as error:
        why = str(error)
    if lock is not None:
        os.close(lock)
    return None, why
