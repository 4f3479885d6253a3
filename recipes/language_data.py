"""A data module of byte sequences for language models: text that every Python has, or any folder of text."""

from __future__ import annotations

import ast
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset
from typing_extensions import override

from lightning_conv.arguments import described
from lightning_conv.recipes.data import InMemoryDataModule, Splits
from lightning_conv.recipes.sizes import require_share, require_size

Part: TypeAlias = Literal["docstrings", "sources"]

BYTES = 256
"""Number of tokens: every byte is one."""

END = 0
"""Token between two files; no text has this byte."""

LEFT_OUT = ("__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo")
"""Folders of the standard library that are not read: what was installed beside it, and tests."""


class LanguageDataModule(InMemoryDataModule):
    """Sequences of bytes and their next bytes, from the standard library of Python or from a folder; nothing is downloaded.

    A sample is (x, y) with x, y of shape (`length`,), int64: y_t is the byte that follows x_t, so `F.cross_entropy(logits.flatten(0, 1),
    y.flatten())` is the usual loss of a language model. Every byte is a token (256 of them). The files of a split are joined with a zero
    byte between two, and cut into sequences that do not overlap.

    A file belongs to the test split or to the training split as a whole, by the CRC-32 of its name and the seed. So no text of the
    test split is in the training split, and the same files of the standard library are held out of both parts: what a network has
    learned from its documentation is not about the files on which its sources are tested. The text changes with the version of Python.

    Args:
        part: `"docstrings"`: the documentation strings of the modules, classes and functions of the standard library. `"sources"`: its
            code without these strings. The two have no line in common.
        folder: a folder whose files are read instead, all that match `pattern`, in their whole text; None: the standard library.
        pattern: shell pattern of the files in `folder`, at any depth.
        length: T, number of bytes of a sequence.
        batch_size: sequences per batch and process.
        test_fraction: share of the files held out, in (0, 1), about.
        n_train: number of training sequences, a seeded subset; None: all.
        n_test: the same for the test split.
        seed: seed of the split, of the subsets and of the shuffling.

    Raises:
        MisconfigurationException: an option is unknown, a size is not positive, `test_fraction` is not in (0, 1), or `folder` is none.
    """

    def __init__(
        self,
        part: Part = "sources",
        folder: str | None = None,
        pattern: str = "*.txt",
        length: int = 128,
        batch_size: int = 32,
        test_fraction: float = 0.1,
        n_train: int | None = None,
        n_test: int | None = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if part not in get_args(Part):
            raise MisconfigurationException(f"part: {part!r} is not one of {', '.join(get_args(Part))}")
        require_share("test_fraction", test_fraction)
        if folder is not None and not (isinstance(folder, (str, Path)) and Path(folder).is_dir()):
            raise MisconfigurationException(f"folder: {described(folder)} is no folder; name one with files of text")
        for name, size in {"length": length, "n_train": n_train, "n_test": n_test}.items():
            require_size(name, size)
        self.part, self.folder, self.pattern, self.length = part, folder, pattern, length
        self.test_fraction = test_fraction
        self._sizes = (n_train, n_test)
        self.save_hyperparameters()

    @override
    def count_train(self) -> int:
        """Return the number of training sequences before a subset is taken; the files are read."""
        return len(self._sequences(held_out=False))

    @override
    def read(self) -> Splits:
        """Read the files and cut them into sequences.

        Raises:
            MisconfigurationException: there is no text, or fewer sequences than asked for.
        """
        train, test = (
            self._subset(self._sequences(held_out=held_out), size, name)
            for held_out, size, name in ((False, self._sizes[0], "n_train"), (True, self._sizes[1], "n_test"))
        )
        return Splits(next_tokens(train), next_tokens(test), BYTES)

    def _sequences(self, *, held_out: bool) -> Tensor:
        """Return the sequences of a split, (n, length + 1), uint8.

        Raises:
            MisconfigurationException: there is no text for one.
        """
        found = [text for name, text in self._texts() if is_held_out(name, self.test_fraction, self.seed) == held_out]
        rows = cut(found, self.length + 1)
        if len(rows) == 0:
            where = "the standard library" if self.folder is None else f"{Path(self.folder).resolve()} ({self.pattern})"
            split = "test" if held_out else "training"
            raise MisconfigurationException(
                f"folder: {where} has {len(found)} files for the {split} split, with less text than one sequence of "
                f"{self.length + 1} bytes; name another folder or pattern, or take a smaller length"
            )
        return rows

    def _texts(self) -> Iterable[tuple[str, bytes]]:
        if self.folder is not None:
            return texts_of(Path(self.folder), self.pattern)
        return texts_of_library(self.part)

    def _subset(self, rows: Tensor, size: int | None, name: str) -> Tensor:
        """Return a seeded subset of the sequences; the test split gives what it has.

        Raises:
            MisconfigurationException: the training split has fewer.
        """
        if size is None or (name == "n_test" and size >= len(rows)):
            return rows
        if size > len(rows):
            raise MisconfigurationException(
                f"{name}: there are {len(rows)} sequences of {self.length} bytes, got {size}"
            )
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))[:size]
        return rows[chosen.sort().values]


def next_tokens(rows: Tensor) -> TensorDataset:
    """Return (x, y) of sequences of T + 1 tokens: the first T of them, and the last T, each (n, T) and int64."""
    wide = rows.long()
    return TensorDataset(wide[:, :-1].contiguous(), wide[:, 1:].contiguous())


def is_held_out(name: str, share: float, seed: int) -> bool:
    """Return whether a file belongs to the test split, by the CRC-32 of its name and the seed.

    Args:
        name: name of the file, relative to its folder.
        share: share of the names that are held out, about.
        seed: another seed holds out other files.
    """
    return zlib.crc32(f"{seed}:{name}".encode()) < share * 2**32


def cut(texts: list[bytes], size: int) -> Tensor:
    """Join texts with ``END`` between two, and cut them into rows, (n, size), uint8; what is left at the end is dropped.

    Args:
        texts: the texts, in order.
        size: tokens of a row.

    Example:
        >>> cut([b"ab", b"c"], 2).tolist()
        [[97, 98], [0, 99]]
    """
    joined = bytearray(bytes([END]).join(texts))
    count = len(joined) // size
    if count == 0:
        return torch.empty(0, size, dtype=torch.uint8)
    return torch.frombuffer(joined, dtype=torch.uint8)[: count * size].view(count, size).clone()


def texts_of(folder: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield names and texts of the files of a folder, in the order of their names, without zero bytes.

    Args:
        folder: the folder.
        pattern: shell pattern of the names, at any depth.
    """
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        yield path.relative_to(folder).as_posix(), path.read_bytes().replace(bytes([END]), b"")


@cache
def texts_of_library(part: Part) -> tuple[tuple[str, bytes], ...]:
    """Return names and texts of the modules of the standard library, in the order of their names; they are read once per process.

    A file that this Python does not parse, such as a template, is left out.

    Args:
        part: see ``LanguageDataModule``.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in folder.rglob("*.py") if not {*path.relative_to(folder).parts} & {*LEFT_OUT})
    texts = []
    for path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
            documented = docstrings(text)
        except (OSError, SyntaxError, ValueError):  # UnicodeDecodeError is a ValueError
            continue
        found = "\n\n".join(said for said, _ in documented) if part == "docstrings" else without(text, documented)
        if found.strip():
            texts.append((path.relative_to(folder).as_posix(), found.encode().replace(bytes([END]), b"")))
    return tuple(texts)


def docstrings(source: str) -> list[tuple[str, range]]:
    """Return the documentation strings of a module, its classes and functions, and the lines that each one takes (the first is 0).

    Args:
        source: text of the module.

    Raises:
        SyntaxError: it is no Python.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node)
            if said:
                place = node.body[0]
                found.append((said, range(place.lineno - 1, place.end_lineno or place.lineno)))
    return sorted(found, key=lambda each: each[1].start)


def without(source: str, documented: list[tuple[str, range]]) -> str:
    """Return a source without the lines of its documentation strings, and without blanks at the ends of lines.

    Args:
        source: text of the module.
        documented: see ``docstrings``.
    """
    gone = {line for _, lines in documented for line in lines}
    return "\n".join(row.rstrip() for line, row in enumerate(source.split("\n")) if line not in gone)
