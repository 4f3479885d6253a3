"""``Request``: the options of a kernel as ``ntk_gram`` and ``plan_ntk`` take them, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lightning_conv.kernels.products.precision import PRECISIONS, Precision
from lightning_conv.networks.evaluation import BatchNormMode

Outputs: TypeAlias = Literal["trace", "full", "sum", "projected"]
EngineName: TypeAlias = Literal["auto", "jacobian"]


@dataclass(frozen=True)
class Request:
    """The options of a kernel; see ``ntk_gram`` for their meaning. Unknown values raise a ValueError."""

    outputs: Outputs
    per_layer: bool
    precision: Precision
    batch_norm: BatchNormMode
    max_memory: float | None
    engine: EngineName
    projections: int

    def __post_init__(self) -> None:
        require_option("outputs", self.outputs, get_args(Outputs))
        require_option("precision", self.precision, PRECISIONS)
        require_option("batch_norm", self.batch_norm, get_args(BatchNormMode))
        require_option("engine", self.engine, get_args(EngineName))
        if self.projections < 2:
            raise ValueError(f"projections: {self.projections}; an estimate with a standard error needs at least 2")


def require_option(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        ValueError: it is not; the message lists the allowed values.
    """
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, allowed))}")
