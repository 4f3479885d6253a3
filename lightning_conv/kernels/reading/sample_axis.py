"""``SampleAxis``: the dimension of a layer's output that contains the samples, found by weighting the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.kernels.reading.recording import LayerCall

Order: TypeAlias = Literal["whole", "outer", "inner"]


@dataclass(frozen=True)
class SampleAxis:
    """The dimension ``dim`` of a layer's output that contains the n samples, alone or merged with m positions.

    The order is ``"whole"`` for samples alone. ``"outer"`` means index = sample * m + position, as for windows or
    frames that were flattened into the batch. ``"inner"`` means index = position * n + sample, as for a flattened
    sequence-first tensor.
    """

    dim: int
    order: Order

    def fits(self, shape: Sequence[int], samples: int) -> bool:
        """Return whether a tensor of ``shape`` can contain the samples this way."""
        if self.dim >= len(shape):
            return False
        size = shape[self.dim]
        return size == samples if self.order == "whole" else size % samples == 0 and size > 0

    def to_front(self, tensor: Tensor, samples: int) -> Tensor:
        """Move the samples to dimension 0: (n, ...), or (n, m, ...) if they are merged with m positions.

        Raises:
            ValueError: the tensor cannot contain the samples this way.
        """
        if not self.fits(tensor.shape, samples):
            raise ValueError(
                f"model: a layer has a tensor of shape {tuple(tensor.shape)} for {samples} samples, but its samples were in dimension "
                f"{self.dim} when the network was read; use engine='jacobian', which goes sample by sample"
            )
        if self.order == "outer":
            return torch.unflatten(tensor, self.dim, (samples, -1)).movedim(self.dim, 0)
        if self.order == "inner":
            return torch.unflatten(tensor, self.dim, (-1, samples)).movedim(self.dim + 1, 0)
        return tensor.movedim(self.dim, 0) if self.dim else tensor


def candidate_axes(shape: Sequence[int], samples: int) -> list[SampleAxis]:
    """Return where the samples could be, the usual places first."""
    whole = [SampleAxis(dim, "whole") for dim in range(min(2, len(shape)))]
    merged = [SampleAxis(0, order) for order in ("outer", "inner")] if shape and shape[0] != samples else []
    return [axis for axis in (*whole, *merged) if axis.fits(shape, samples)]


def sample_axes(
    calls: Sequence[LayerCall],
    plain: Sequence[Tensor | None],
    weighted: Sequence[Tensor | None],
    weights: Tensor,
    tolerance: float,
) -> dict[int, SampleAxis]:
    """Find where the samples are in the output of each call on which the outputs depend.

    If B of a call is zero it tells nothing, as for the last steps of a sequence that is read backwards and used at its
    first step only. Such a call is treated like another one with the same parameters and the same shape.

    Args:
        calls: the recorded calls.
        plain: B of each call; None where the outputs do not depend on it.
        weighted: B of each call, when sample i is weighted by ``weights[i]``.
        weights: (n,).
        tolerance: relative deviation that counts as rounding.

    Returns:
        The sample axis by index of the call, for those calls where it could be found.
    """
    axes: dict[int, SampleAxis] = {}
    alike: dict[tuple[object, ...], SampleAxis] = {}
    for index, (call, p, w) in enumerate(zip(calls, plain, weighted, strict=True)):
        axis = None if p is None or w is None else _axis(p, w, weights, tolerance)
        if axis is not None:
            axes[index] = alike[(*call.names.values(), call.shape)] = axis
    for index, (call, p) in enumerate(zip(calls, plain, strict=True)):
        twin = alike.get((*call.names.values(), call.shape))
        if index not in axes and twin is not None and p is not None and not bool(p.any()):
            axes[index] = twin
    return axes


def _axis(plain: Tensor, weighted: Tensor, weights: Tensor, tolerance: float) -> SampleAxis | None:
    """Return the axis along which weighting the samples has weighted B; None if there is none or B is zero."""
    samples = len(weights)
    if not bool(plain.any()):
        return None
    for axis in candidate_axes(plain.shape, samples):
        front, after = (axis.to_front(value, samples) for value in (plain, weighted))
        if close(after, front * weights.view(-1, *[1] * (front.ndim - 1)), tolerance):
            return axis
    return None


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether |found - expected| <= tolerance |expected|."""
    return bool((found - expected).norm() <= tolerance * expected.norm())
