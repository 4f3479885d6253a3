"""``Request``: the options of a kernel as ``ntk_gram`` and ``plan_ntk`` take them, checked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch

from lightning_conv.arguments import require_option, require_type
from lightning_conv.kernels.products.precision import PRECISIONS, Precision
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.origins import Make, path_required

Outputs: TypeAlias = Literal["trace", "full", "sum", "projected"]
KernelOutputs: TypeAlias = Literal["trace", "full", "sum", "projected", "cotangents"]
"""What a kernel may be of: ``Outputs``, or one number s_i . u_i per sample, with s_i from ``cotangents=``."""
EngineName: TypeAlias = Literal["auto", "jacobian"]

EXACT = 'use precision="exact", whose bounds allow for that type, or remove the cast'
OWN_TYPE = "remove the cast, or convert the model (model.float())"
"""What to do where a network has no path in float64, or in float32."""


@dataclass(frozen=True)
class Request:
    """The options of a kernel; see ``ntk_gram`` for their meaning. Unknown values raise a ValueError.

    ``outputs`` was looked at by ``contracted_outputs``, which knows what the user has asked for.
    """

    outputs: KernelOutputs  # from ``contracted_outputs``
    per_layer: bool
    precision: Precision
    batch_norm: BatchNormMode
    max_memory: float | None
    engine: EngineName
    projections: int

    def __post_init__(self) -> None:
        require_option("precision", self.precision, PRECISIONS)
        require_option("batch_norm", self.batch_norm, get_args(BatchNormMode))
        require_option("engine", self.engine, get_args(EngineName))
        require_type("projections", self.projections, Integral, "a whole number of at least 2")
        if self.projections < 2:
            raise ValueError(f"projections: {self.projections}; an estimate with a standard error needs at least 2")

    @property
    def dtype(self) -> torch.dtype | None:
        """Type that the passes are asked to have; None: that of the model, at least float32."""
        return torch.float64 if self.precision == "certified" else None

    def path(self, make: Make, inputs: Inputs) -> AbstractContextManager[None]:
        """Return a context that explains errors of a network that cannot be evaluated in that type; see ``path_required``."""
        cure = EXACT if self.precision == "certified" else OWN_TYPE
        return path_required(make, inputs, self.dtype, asked=f'precision: "{self.precision}"', cure=cure)


def contracted_outputs(
    outputs: str, cotangents: object, *, default: str, allowed: Sequence[str] = get_args(Outputs)
) -> Any:
    """Return what the kernel is of: the ``outputs`` that were asked for, or ``"cotangents"`` where these are given.

    Args:
        outputs: the option as it was given.
        cotangents: the argument of this name; None: not given.
        default: the default of ``outputs``.
        allowed: values of ``outputs``.

    Raises:
        ValueError: ``outputs`` is not allowed, or is not the default although cotangents are given.
    """
    if outputs == "cotangents":  # as results call it
        raise ValueError(
            "outputs: 'cotangents' is no option; pass cotangents=, one row of output shape per sample, and leave out outputs="
        )
    if cotangents is None:
        require_option("outputs", outputs, allowed)
        return outputs
    if outputs != default:
        raise ValueError(
            f"outputs: {outputs!r} together with cotangents=, which replace the outputs of each sample by the one number s_i . u_i; "
            "leave out outputs= or cotangents="
        )
    return "cotangents"
