"""``Writer``: the arrays of a checkpoint, written block by block, so that an interrupted one can be continued."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lightning_conv.sketches.folder import EXPONENTS, HEADER, PART, RECORD, ROWS, header, read_json, write_json

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


class Writer:
    """Appends blocks of sketches to a checkpoint that is not complete, and continues one that was interrupted.

    What follows the last note in the journal is cut off, so that a continued checkpoint is the same as one that was not interrupted.

    Args:
        folder: folder of the checkpoint when it is complete.
        size: K.
        dtype: of the sketches.
        identity: digest of the settings of the store.
        weights: digest of the weights.

    Raises:
        ValueError: an interrupted checkpoint of this name has other weights or settings, or another process writes it.
    """

    def __init__(self, folder: Path, size: int, dtype: np.dtype[Any], identity: str, weights: str) -> None:
        self.folder, self.part = folder, folder.with_name(folder.name + PART)
        self._kinds = ((ROWS, dtype, (size,)), (EXPONENTS, np.dtype("<i2"), ()))
        self.state: dict[str, Any] = {
            "samples": 0,
            "batches": 0,
            "weights": weights,
            "data": "",
            "sums": [0, 0],
            "store": identity,
            "complete": False,
        }
        self.part.mkdir(parents=True, exist_ok=True)
        self._files = []
        for name, _, _ in self._kinds:
            (self.part / name).touch()
            self._files.append((self.part / name).open("r+b"))
        try:
            self._lock()
            if (self.part / RECORD).is_file():
                self._continue()
        except ValueError:
            self.close()
            raise
        for file, (_, kind, shape) in zip(self._files, self._kinds, strict=True):
            file.write(header(kind, (0, *shape)))
            file.truncate(HEADER + self.state["samples"] * kind.itemsize * int(np.prod(shape, dtype=int)))
            file.seek(0, os.SEEK_END)
        self._noted = self.state["samples"]

    def _lock(self) -> None:
        """Keep other processes from writing the same checkpoint; the lock ends with this process, however it ends."""
        if fcntl is None:  # Windows
            return
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"name: {self.folder.name!r} is being written by another process; let one rank write it, or take another name"
            ) from None

    def _continue(self) -> None:
        found = read_json(self.part / RECORD, tuple(self.state))
        for key, what in (("store", "settings"), ("weights", "weights")):
            if found[key] != self.state[key]:
                raise ValueError(
                    f"name: {self.folder.name!r} was begun with other {what}; continue with those, take another name, or remove {self.part}"
                )
        for name, kind, shape in self._kinds:
            path, need = self.part / name, HEADER + found["samples"] * kind.itemsize * int(np.prod(shape, dtype=int))
            if not path.is_file() or path.stat().st_size < need:
                raise ValueError(
                    f"name: {self.folder.name!r}: {path} is shorter than its journal says; remove {self.part}"
                )
        self.state = found

    @property
    def pending(self) -> int:
        """Number of samples that are not in the journal yet."""
        return int(self.state["samples"] - self._noted)

    def append(self, rows: np.ndarray[Any, Any], exponents: np.ndarray[Any, Any], data: str) -> None:
        """Append the sketches of one batch.

        Args:
            rows: (t, K).
            exponents: (t,).
            data: digest of all batches so far.
        """
        for number, (file, array) in enumerate(zip(self._files, (rows, exponents), strict=True)):
            raw = np.ascontiguousarray(array, self._kinds[number][1]).tobytes()
            file.write(raw)
            self.state["sums"][number] = zlib.crc32(raw, self.state["sums"][number])
        self.state["samples"] += len(rows)
        self.state["batches"] += 1
        self.state["data"] = data

    def note(self) -> None:
        """Bring everything to the disk, then note it in the journal."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        write_json(self.part / RECORD, self.state)
        self._noted = self.state["samples"]

    def finish(self) -> None:
        """Write the headers and give the folder its name."""
        for file, (_, kind, shape) in zip(self._files, self._kinds, strict=True):
            file.seek(0)
            file.write(header(kind, (self.state["samples"], *shape)))
        self.state["complete"] = True
        self.note()
        self.close()
        os.replace(self.part, self.folder)

    def close(self) -> None:
        """Close the files; what is not in the journal is cut off next time."""
        for file in self._files:
            file.close()
