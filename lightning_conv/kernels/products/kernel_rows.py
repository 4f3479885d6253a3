"""``KernelRows``: how a vector over the rows of a kernel becomes gradients of the outputs, and how their derivatives become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_conv.kernels.products.combinations import Combinations, SharedRows, cotangents_of_shape
from lightning_conv.kernels.products.jacobian_map import JacobianMap
from lightning_conv.kernels.products.scaled_columns import scaled_columns
from lightning_conv.kernels.reading.contracted_error import contracted_error
from lightning_conv.networks.inputs import sample_count


class KernelRows:
    """The rows of a kernel of n samples with C outputs each.

    Args:
        samples: n.
        outputs: C.
        each: whether every output has a row of its own, N = n C, row i C + c; otherwise every sample has one, N = n.
        contracted: what makes one number of the outputs of a sample; None: a row is of one output, which is said at each call.
        device: that of the vectors that come back.

    Attributes:
        size: N.
        copies: how many outputs one after the other are the row of a sample: C for a kernel summed over the outputs, otherwise 1.
    """

    def __init__(
        self, samples: int, outputs: int, *, each: bool, contracted: Combinations | None, device: torch.device
    ) -> None:
        self._samples, self._outputs, self._each = samples, outputs, each
        self.contracted, self._device = contracted, device
        self.size = samples * (outputs if each else 1)
        self.copies = 1 if each or contracted is not None else outputs

    def columns(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors (N,) or (N, k) as columns that ``cotangents`` takes, and the powers of two of ``scaled_columns``.

        Raises:
            ValueError: the first dimension is not N.
        """
        columns, scales = scaled_columns(vectors, self.size, self._device)
        columns, further = scaled_columns(self.scaled(columns), self.size, self._device)
        return columns, scales * further

    def scaled(self, columns: Tensor) -> Tensor:
        """Multiply rows by the powers of two that ``Combinations.taken`` leaves out of the cotangents."""
        scales = None if self.contracted is None else self.contracted.scales
        return columns if scales is None else columns * scales[:, None]

    def cotangents(self, rows: Tensor, output: Tensor | None) -> Callable[[slice], Tensor]:
        """Return what gives the output gradients (b, t, C) of a chunk of samples.

        Args:
            rows: b vectors over the rows, (b, N).
            output: which output is the row of a sample, (b,), where there are ``copies``; None: there are none.
        """

        def of(cut: slice) -> Tensor:
            if self._each:
                return rows.reshape(len(rows), self._samples, self._outputs)[:, cut]
            if self.contracted is not None:
                return rows[:, cut, None] * self.contracted.taken(slice(0, 1), cut, rows)[0]
            assert output is not None
            return rows[:, cut, None] * torch.nn.functional.one_hot(output, self._outputs)[:, None]

        return of

    def values(self, output: Tensor | None) -> Callable[[Tensor, slice], Tensor]:
        """Return the transpose of ``cotangents``: it reduces the output derivatives (b, t, C) of a chunk to (b, t).

        Args:
            output: see ``cotangents``.
        """

        def of(images: Tensor, cut: slice) -> Tensor:
            if self._each:
                return images
            if self.contracted is not None:
                return (images * self.contracted.taken(slice(0, 1), cut, images)[0]).sum(2)
            assert output is not None
            return images[torch.arange(len(images), device=images.device), :, output]

        return of


def contraction(network: JacobianMap, given: Tensor | None) -> tuple[Combinations, float]:
    """Return what makes one number of the outputs of each sample, and how far its terms cancel.

    Args:
        network: the map of the Jacobian.
        given: one row of output shape per sample; None: the outputs are summed.

    Returns:
        The combination, and the factor by which the rounding of the passes is larger relative to the contracted kernel than to the whole
        one: an estimate from the first few samples.
    """
    module = network.module
    with network.evaluating():
        if given is None:
            ones = torch.ones(1, network.n_outputs, dtype=module.dtype, device=module.device)
            found: Combinations = SharedRows(ones)
        else:
            found = cotangents_of_shape(given, module, network.few, network.n_outputs)
        count = None if network.couples else sample_count(network.few)
        measured = contracted_error(module, network.names, network.inputs, found, count=count, compare=False)
    return found, measured.relative(1.0, None)
