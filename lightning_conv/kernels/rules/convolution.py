r"""Convolutions in one, two and three dimensions, and their transposes, as outer products of patches and pixels.

A convolution is a linear layer that is applied to patches. With A (positions x patch) the patches of one sample and B
(positions x channels) its output gradients,

.. math:: \partial u / \partial W = B^T A .

In the transposed convolution pixels and patches exchange their roles. Source: Rochette, Manoel, Tramel 2019
(1912.06015).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, OuterRule


def patches(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    positions: Sequence[int],
) -> Tensor:
    """Return all patches of zero-padded images as a strided view; only the padding is copied.

    Args:
        images: (N, C, *S).
        kernel: size k of a patch in each dimension.
        stride: step between patches in each dimension.
        padding: zeros (before, after) in each dimension.
        dilation: step inside a patch in each dimension.
        positions: number T of patches in each dimension.

    Returns:
        The patches, (N, *T, *k, C).
    """
    pixels = images.movedim(1, -1)
    widths = [width for pair in reversed(padding) for width in pair]
    # Channels last: each patch is then a few long runs of memory, and the copy that follows is three times faster.
    padded = F.pad(pixels, (0, 0, *widths)) if any(widths) else pixels.contiguous()
    steps = padded.stride()
    spatial = steps[1:-1]
    return padded.as_strided(
        (padded.shape[0], *positions, *kernel, padded.shape[-1]),
        (
            steps[0],
            *(s * t for s, t in zip(spatial, stride, strict=True)),
            *(s * d for s, d in zip(spatial, dilation, strict=True)),
            steps[-1],
        ),
    )


def grouped_patches(windows: Tensor, dimensions: int, groups: int) -> Tensor:
    """Reshape patches (N, *T, *k, C) to (N, T, groups, k C/groups)."""
    count, channels = windows.shape[0], windows.shape[-1]
    size = prod(windows.shape[1 + dimensions : 1 + 2 * dimensions])
    split = windows.reshape(count, -1, size, groups, channels // groups)
    return split.transpose(2, 3).flatten(3)


def pixels_by_group(images: Tensor, groups: int) -> Tensor:
    """Reshape images (N, C, *S) to (N, S, groups, C/groups)."""
    return torch.unflatten(images.flatten(2).transpose(1, 2), 2, (groups, -1))


class _Convolution(OuterRule):
    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def _each(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, int):
            return (value,) * self.dimensions
        return tuple(value) * (self.dimensions if len(value) == 1 else 1)

    def holds(self, arguments: Arguments) -> bool:
        """Return whether the images are batched."""
        return bool(arguments["input"].ndim == self.dimensions + 2)

    def bias_rows(self, gradients: Tensor) -> Tensor:
        """Sum the gradients over the pixels."""
        return gradients.flatten(3).sum(3)


class ConvolutionRule(_Convolution):
    """Rule of ``F.conv1d/2d/3d(input, weight, bias, stride, padding, dilation, groups)``.

    The weight has shape (out, in/groups, *k).
    """

    signature = "input weight bias stride padding dilation groups"

    def factor_inputs(self, arguments: Arguments) -> Tensor:
        """Return A, the patches of the input, (N, T, groups, k in/groups)."""
        images, kernel = arguments["input"], arguments["weight"].shape[2:]
        stride, dilation = self._each(arguments.get("stride", 1)), self._each(arguments.get("dilation", 1))
        padding = self._padding(arguments.get("padding", 0), kernel, dilation)
        positions = [
            (size + sum(pad) - d * (k - 1) - 1) // step + 1
            for size, pad, d, k, step in zip(images.shape[2:], padding, dilation, kernel, stride, strict=True)
        ]
        windows = patches(images, kernel, stride, padding, dilation, positions)
        return grouped_patches(windows, self.dimensions, arguments.get("groups", 1))

    def _padding(self, value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
        if value == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(width, width) for width in self._each(0 if value == "valid" else value)]

    def factor_gradients(self, arguments: Arguments, gradients: Tensor) -> Tensor:
        """Return B, the pixels of the output gradients, (N, T, groups, out/groups)."""
        return pixels_by_group(gradients, arguments.get("groups", 1))

    def to_parameter(self, arguments: Arguments, outer: Tensor) -> Tensor:
        """Rearrange (..., groups, out/groups, k in/groups) to (..., out, in/groups, *k)."""
        shape = arguments["weight"].shape
        split = torch.unflatten(outer, -1, (-1, shape[1])).transpose(-1, -2)
        return torch.unflatten(split.flatten(-4, -3), -1, shape[2:])


class TransposedConvolutionRule(_Convolution):
    """Rule of ``F.conv_transpose1d/2d/3d(input, weight, bias, stride, padding, output_padding, groups, dilation)``.

    With weight (in, out/groups, *k), du/dW is the sum over input pixels of the outer product of the pixel and its patch
    of the output gradients.
    """

    signature = "input weight bias stride padding output_padding groups dilation"
    bias_is_constant_input = False

    def factor_inputs(self, arguments: Arguments) -> Tensor:
        """Return A, the pixels of the input, (N, T, groups, in/groups)."""
        return pixels_by_group(arguments["input"], arguments.get("groups", 1))

    def factor_gradients(self, arguments: Arguments, gradients: Tensor) -> Tensor:
        """Return B, the patches of the output gradients, (N, T, groups, k out/groups)."""
        kernel, positions = arguments["weight"].shape[2:], arguments["input"].shape[2:]
        stride, dilation = self._each(arguments.get("stride", 1)), self._each(arguments.get("dilation", 1))
        padding = [(width, width) for width in self._each(arguments.get("padding", 0))]
        windows = patches(gradients, kernel, stride, padding, dilation, positions)
        return grouped_patches(windows, self.dimensions, arguments.get("groups", 1))

    def to_parameter(self, arguments: Arguments, outer: Tensor) -> Tensor:
        """Rearrange (..., groups, k out/groups, in/groups) to (..., in, out/groups, *k)."""
        shape = arguments["weight"].shape
        split = torch.unflatten(outer, -2, (-1, shape[1]))  # (..., groups, k, out/groups, in/groups)
        turned = torch.movedim(split, (-1, -2, -3), (-3, -2, -1)).flatten(-4, -3)
        return torch.unflatten(turned, -1, shape[2:])
