"""The folder of a store: its files, and the checkpoints that are complete, each of two arrays."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 1
META, RECORD, ROWS, EXPONENTS = "meta.json", "checkpoint.json", "rows.npy", "exponents.npy"
PART = ".part"
"""End of the name of a checkpoint that is not complete."""
HEADER = 128
"""Bytes of the header of an array, the same for any number of samples."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*")
AT_ONCE = 2**24
"""Bytes that are read at once to verify a file."""


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file so that it is there as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(json.dumps(data, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def digest_of(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the data of a file that ``write_json`` wrote.

    Args:
        path: of the file.
        keys: what it has to have.

    Raises:
        ValueError: the file is missing, is no JSON, or lacks a key.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"folder: {path} cannot be read ({type(error).__name__}: {error}); name a store, or create it"
        ) from None
    if not isinstance(data, dict) or any(key not in data for key in keys):
        raise ValueError(
            f"folder: {path} is not a file of a store (it lacks {', '.join(keys)}); name a store, or create it"
        )
    return data


def require_name(name: object) -> str:
    """Return the name of a checkpoint if it can be that of a folder.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.endswith((PART, ".new")):
        raise ValueError(f"name: {name!r}; need letters, digits and the signs _ . = + -, such as 'step_100'")
    return name


def header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of an ``.npy`` file (format 1.0) in 128 bytes, so that it can be replaced when the number of rows is known."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    room = HEADER - 10 - len(text) - 1
    assert room >= 0
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + (text + " " * room + "\n").encode("latin1")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: the sketches of n samples at one set of weights."""

    folder: Path
    samples: int
    weights: str  # digest of all parameters and buffers
    data: str  # digest of all batches
    sums: tuple[int, int]  # CRC-32 of the two arrays
    size: int
    dtype: np.dtype[Any]

    @classmethod
    def read(cls, folder: Path, size: int, dtype: np.dtype[Any], identity: str) -> Checkpoint:
        """Return the checkpoint in a folder.

        Args:
            folder: its folder.
            size: K.
            dtype: of the sketches.
            identity: digest of the settings of the store.

        Raises:
            ValueError: a file is missing or has another size than it says, or belongs to another store.
        """
        data = read_json(folder / RECORD, ("samples", "weights", "data", "sums", "store", "complete"))
        if data["store"] != identity:
            raise ValueError(f"name: {folder.name!r} was written with other settings than {META}; remove {folder}")
        found = cls(folder, int(data["samples"]), data["weights"], data["data"], tuple(data["sums"]), size, dtype)
        for name, kind, shape in found._arrays:
            path, need = folder / name, HEADER + found.samples * kind.itemsize * (size if len(shape) > 1 else 1)
            there = path.stat().st_size if path.is_file() else -1
            if there != need:
                what = "is missing" if there < 0 else f"has {there} bytes"
                raise ValueError(
                    f"name: {folder.name!r}: {path} {what}, need {need} for {found.samples} samples; remove {folder} and add it anew"
                )
            with path.open("rb") as file:
                if file.read(HEADER) != header(kind, shape):
                    raise ValueError(
                        f"name: {folder.name!r}: the header of {path} was changed; remove {folder} and add it anew"
                    )
        return found

    @property
    def _arrays(self) -> tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]:
        return (ROWS, self.dtype, (self.samples, self.size)), (EXPONENTS, np.dtype("<i2"), (self.samples,))

    def arrays(self) -> tuple[Any, Any]:
        """Return sketches (n, K) and exponents (n,) as they are on disk, mapped into memory."""
        return tuple(  # type: ignore[return-value]
            np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
            if all(shape)
            else np.zeros(shape, kind)  # an empty file cannot be mapped
            for name, kind, shape in self._arrays
        )

    def verify(self) -> None:
        """Compare the check sums of the arrays with those that were noted when they were written.

        Raises:
            ValueError: a file was changed.
        """
        for (name, _, _), expected in zip(self._arrays, self.sums, strict=True):
            found = 0
            with (self.folder / name).open("rb") as file:
                file.seek(HEADER)
                while part := file.read(AT_ONCE):
                    found = zlib.crc32(part, found)
            if found != expected:
                raise ValueError(
                    f"name: {self.folder.name!r}: {self.folder / name} was changed after it was written; remove the folder and add it anew"
                )
