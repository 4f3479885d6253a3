"""``Along``: where the samples are in a tensor, and how that follows through changes of shape and elementwise operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


class CouplesError(Exception):
    """An operator may mix samples, or there is no rule for it."""


@dataclass(frozen=True)
class Along:
    """Index i of dimension ``dim`` of a tensor belongs to the sample (i // ``inner``) mod n, as after samples and positions were merged."""

    dim: int
    inner: int = 1


@dataclass(frozen=True)
class Found:
    """Tells where the samples are in tensors."""

    along: Callable[[Tensor], Along | None]

    def of(self, tensor: object) -> Along:
        """Return where they are in a tensor that must depend on them.

        Raises:
            CouplesError: it does not.
        """
        found = self.along(tensor) if isinstance(tensor, Tensor) else None
        if found is None:
            raise CouplesError
        return found

    def none(self, *others: object) -> None:
        """Require that tensors do not depend on the samples.

        Raises:
            CouplesError: one does.
        """
        if any(isinstance(each, Tensor) and self.along(each) is not None for each in others):
            raise CouplesError


def merged(along: Along, given: Sequence[int], made: Sequence[int], n: int) -> Along:
    """Return where samples are after a change of shape that keeps the order of the numbers.

    Args:
        along: where they were.
        given: the shape before.
        made: the shape after.
        n: number of samples.

    Raises:
        CouplesError: no dimension tells the samples apart.
    """
    apart = along.inner * math.prod(given[along.dim + 1 :])  # sample of number i in that order: (i // apart) mod n
    behind = 1
    for dim in reversed(range(len(made))):
        inner, rest = divmod(apart, behind)
        if rest == 0 and inner > 0 and made[dim] % (inner * n) == 0:
            return Along(dim, inner)
        behind *= made[dim]
    raise CouplesError


def elementwise(tensors: Sequence[Tensor], result: Tensor, found: Found) -> Along:
    """Return where samples are after an operator that takes each number of its result from those at the same place.

    Args:
        tensors: what it takes, broadcast to one shape.
        result: what it returns.
        found: where the samples are.

    Raises:
        CouplesError: they are at different places, or another tensor differs from sample to sample.
    """
    places = {(each.ndim - one.dim, one.inner) for each in tensors if (one := found.along(each)) is not None}
    if len(places) != 1:
        raise CouplesError
    right, inner = places.pop()
    for each in tensors:
        if found.along(each) is None and each.ndim >= right and not is_constant(each, each.ndim - right):
            raise CouplesError
    return Along(result.ndim - right, inner)


def is_constant(tensor: Tensor, dim: int) -> bool:
    """Return whether a tensor has the same numbers along a dimension, as after it was expanded.

    Args:
        tensor: the tensor.
        dim: the dimension.
    """
    return tensor.shape[dim] == 1 or tensor.stride(dim) == 0
