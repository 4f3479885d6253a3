"""``Settings``: what all sketches of a store have in common, as its file ``meta.json`` says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from lightning_conv.arguments import require_option, require_seed, require_whole
from lightning_conv.losses.kind import loss_kind
from lightning_conv.sketches.folder import META, VERSION, digest_of, read_json, write_json
from lightning_conv.sketches.layout import Layout, make_block

Stored: TypeAlias = Literal["float16", "float32"]
LEAST_GROUPS = 3
"""Groups from which the jackknife of an alignment has an error."""
KEYS = ("version", "seed", "size", "dtype", "loss", "parameters", "layout", "digest")


@dataclass(frozen=True)
class Settings:
    """The settings of a store.

    Attributes:
        seed: of all projections.
        size: numbers that the sketch of one block may have, all groups together.
        dtype: type of the numbers on disk.
        loss: name of the loss whose gradients are sketched; None: random combinations of the outputs.
        shapes: of the parameters.
        layout: of the sketches.
    """

    seed: int
    size: int
    dtype: Stored
    loss: str | None
    shapes: Mapping[str, tuple[int, ...]]
    layout: Layout

    @classmethod
    def make(
        cls,
        names: Sequence[tuple[str, ...]],
        shapes: Mapping[str, Sequence[int]],
        *,
        size: int,
        groups: int,
        dtype: Stored,
        seed: int,
        loss_fn: object | None,
    ) -> Settings:
        """Return the settings of a new store.

        Args:
            names: the parameters in blocks.
            shapes: of all parameters.
            size: see ``SketchStore.create``.
            groups: likewise.
            dtype: likewise.
            seed: likewise.
            loss_fn: likewise.
        """
        plain = {name: tuple(int(each) for each in shape) for name, shape in shapes.items()}
        once = loss_fn is not None
        layout = Layout(tuple(make_block(each, plain, size, groups, once=once) for each in names), groups, once)
        return cls(int(seed), size, dtype, None if loss_fn is None else loss_kind(loss_fn).described, plain, layout)

    def as_json(self) -> dict[str, Any]:
        """Return the settings in plain types, with their digest."""
        data = {
            "version": VERSION,
            "seed": self.seed,
            "size": self.size,
            "dtype": self.dtype,
            "loss": self.loss,
            "parameters": {name: list(shape) for name, shape in self.shapes.items()},
            "layout": self.layout.as_json(),
        }
        return {**data, "digest": digest_of(data)}

    @property
    def identity(self) -> str:
        """Digest of the settings, by which each checkpoint knows its store."""
        return str(self.as_json()["digest"])

    @property
    def kind(self) -> np.dtype[Any]:
        """Type of the numbers on disk, little-endian."""
        return np.dtype({"float16": "<f2", "float32": "<f4"}[self.dtype])

    @property
    def lift(self) -> int:
        """Exponent of the largest entry of a sketch on disk: in float16 at the upper end of its range, so that small entries count."""
        return 15 if self.dtype == "float16" else 0

    @property
    def rounding(self) -> float:
        """Bound of the relative error of a sketch by the rounding of its numbers on disk."""
        # What lies below the normal numbers of float16 is 2^-28 of the largest entry, so it adds at most sqrt(K) 2^-39.
        return float(np.finfo(self.kind).eps) / 2 * (1 + 2**-8)

    def write(self, folder: Path) -> None:
        """Write ``meta.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / META, self.as_json())

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Return the settings of the store in a folder.

        Raises:
            ValueError: there is no store, its version is another, or its file was changed by hand.
        """
        path = folder / META
        data = read_json(path, KEYS)
        if data["version"] != VERSION:
            raise ValueError(
                f"folder: {path} has version {data['version']!r}, this is {VERSION}; create the store anew"
            )
        digest = data.pop("digest")
        if digest != digest_of(data):
            raise ValueError(
                f"folder: {path} was changed after it was written (its digest differs); create the store anew"
            )
        shapes = {name: tuple(map(int, shape)) for name, shape in data["parameters"].items()}
        layout = Layout.from_json(data["layout"])
        return cls(int(data["seed"]), int(data["size"]), data["dtype"], data["loss"], shapes, layout)


def require_settings(size: object, groups: object, dtype: object, seed: object) -> None:
    """Refuse settings that a store cannot have.

    Args:
        size: see ``SketchStore.create``.
        groups: likewise.
        dtype: likewise.
        seed: likewise.

    Raises:
        TypeError: ``size``, ``groups`` or ``seed`` is no whole number.
        ValueError: there are too few groups, fewer numbers than groups, or the type is another.
    """
    require_whole("groups", groups, least=LEAST_GROUPS)
    require_whole("size", size, least=int(groups))  # type: ignore[call-overload]
    require_option("dtype", dtype, get_args(Stored))
    require_seed(seed)
