"""A data module over text that every Python has: the sources of its standard library, labelled by package."""

import importlib.util
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import TensorDataset
from typing_extensions import override

from lightning_conv.arguments import described
from lightning_conv.recipes.data import InMemoryDataModule, Splits, stratified_split
from lightning_conv.recipes.sizes import require_share, require_size

PACKAGES = ("asyncio", "email", "http", "importlib", "multiprocessing", "unittest")
"""Packages of the standard library, each with several thousand lines."""

WORD = re.compile(r"[A-Za-z]{2,}")


class TextDataModule(InMemoryDataModule):
    """Pieces of Python's own standard library; the class is the package that a piece is from. Nothing is downloaded.

    A piece is a run of `lines` consecutive lines of a file with at least `FEWEST_WORDS` words. It becomes a bag of hashed words: the entry
    of each word's hash is log(1 + count), scaled to norm 1, so that the inputs have the shape (n, `features`). The hash is CRC-32, hence
    the same in every process; the text, and with it the number of pieces, changes with the version of Python.

    Args:
        batch_size: samples per batch and process.
        lines: lines of a piece.
        features: entries of a bag; words whose hashes agree share one.
        packages: names of packages, at least two, whose sources are on disk.
        test_fraction: share of the samples held out, in (0, 1); rounded up to whole samples.
        n_train: size of a seeded subset of the rest, with the classes nearly in their shares; None: all of it.
        seed: seed of the split and of the shuffling.

    Raises:
        MisconfigurationException: if `test_fraction` is not in (0, 1), a size is not positive, or there are fewer than two packages.
    """

    def __init__(
        self,
        batch_size: int = 64,
        lines: int = 20,
        features: int = 512,
        packages: Sequence[str] = PACKAGES,
        test_fraction: float = 0.2,
        n_train: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        require_share("test_fraction", test_fraction)
        for name, size in {"n_train": n_train, "lines": lines, "features": features}.items():
            require_size(name, size)
        if (
            isinstance(packages, str)
            or not isinstance(packages, Sequence)
            or not all(isinstance(each, str) for each in packages)
        ):
            raise MisconfigurationException(f"packages: {described(packages)}; need a list of names of packages")
        if len(set(packages)) < 2:
            raise MisconfigurationException(f"packages: {list(packages)}; need at least two different ones")
        self.lines, self.features, self.packages = lines, features, tuple(dict.fromkeys(packages))
        self.test_fraction = test_fraction
        self._n_train = n_train
        self.save_hyperparameters()

    @override
    def count_train(self) -> int:
        """Return the number of pieces that are not held out; the files are read."""
        pieces = sum(len(pieces_of(name, self.lines)) for name in self.packages)
        return pieces - math.ceil(self.test_fraction * pieces)

    @override
    def read(self) -> Splits:
        """Read and split the pieces.

        Raises:
            MisconfigurationException: if fewer training samples are left than asked for.
        """
        found = [pieces_of(name, self.lines) for name in self.packages]
        labels = torch.cat([torch.full((len(pieces),), number) for number, pieces in enumerate(found)])
        inputs = torch.stack([bag_of_words(piece, self.features) for pieces in found for piece in pieces])
        test, train = stratified_split(labels, self.test_fraction, self.seed, self._n_train)
        return Splits(
            TensorDataset(inputs[train], labels[train]), TensorDataset(inputs[test], labels[test]), len(self.packages)
        )


FEWEST_WORDS = 20
"""Words of a piece, at least: blank and commented-out stretches say nothing of a package."""


def pieces_of(package: str, lines: int) -> list[str]:
    """Return the pieces of a package's own files, in the order of their names.

    Args:
        package: name of the package.
        lines: lines of a piece; what is left at the end of a file is dropped.

    Raises:
        MisconfigurationException: if the sources of the package are not on disk, or have no piece of this length.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    pieces = []
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
        whole = ("\n".join(rows[start : start + lines]) for start in range(0, len(rows) - lines + 1, lines))
        pieces += [piece for piece in whole if len(WORD.findall(piece)) >= FEWEST_WORDS]
    if not pieces:
        where = ", ".join(map(str, folders)) or "this Python has no such package"
        raise MisconfigurationException(
            f"packages: there is no source of {package!r} with a piece of {lines} lines ({where}); name other packages of the "
            "standard library, such as json or xml.dom"
        )
    return pieces


def bag_of_words(text: str, features: int) -> Tensor:
    """Return the bag of hashed words of a text, (features,): log(1 + count) by CRC-32 of the word in small letters, of norm 1.

    Args:
        text: a text.
        features: number of entries.

    Example:
        >>> bag_of_words("to be or not to be", 4).norm().item()
        1.0
    """
    counts = torch.zeros(features)
    for word in WORD.findall(text):
        counts[zlib.crc32(word.lower().encode()) % features] += 1
    bag = counts.log1p()
    scaled: Tensor = bag / bag.norm().clamp(min=torch.finfo(bag.dtype).tiny)
    return scaled
