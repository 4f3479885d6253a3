"""Random crops and mirror images, drawn as a function of (seed, epoch, sample): a resumed run sees the same ones."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from lightning_conv.callbacks.run.data.sampling import register_sampler


class RandomCrops(Dataset[tuple[Tensor, ...]]):
    """Images shifted at random by up to `padding` pixels each way, and mirrored with probability 1/2 on request.

    The usual augmentation of small images. `AugmentedSampler` asks for a sample by (epoch, index): its shift is then
    row `index` of a table drawn from (seed, epoch) alone. A sample that is asked for by its index alone is drawn anew
    from the global random state each time.

    Args:
        images: shape (n, channels, height, width).
        labels: class of each image, shape (n,).
        padding: greatest shift in pixels; the border that comes in is `fill`.
        fill: value of each channel on the border, shape (channels,).
        mirror: also mirror images left to right.
        seed: seed of the shifts and the mirroring.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, padding: int, fill: Tensor, mirror: bool, seed: int) -> None:
        count, channels, self._height, self._width = images.shape
        size = (count, channels, self._height + 2 * padding, self._width + 2 * padding)
        self._padded = fill.reshape(1, -1, 1, 1).expand(size).clone()
        self._padded[:, :, padding : padding + self._height, padding : padding + self._width] = images
        self._labels, self._padding, self._mirror, self._seed = labels, padding, mirror, seed
        self._drawn: tuple[int, list[list[int]]] | None = None  # epoch, and (top, left, mirrored) of every sample

    def __len__(self) -> int:
        return len(self._labels)

    @override
    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return an image (channels, height, width) and its label."""
        if isinstance(key, tuple):
            epoch, index = key
            top, left, mirrored = self._table(epoch)[index]
        else:
            index = key
            top, left, mirrored = self._draw(1, None)[0]
        image = self._padded[index, :, top : top + self._height, left : left + self._width]
        return image.flip(-1) if mirrored else image.clone(), self._labels[index]

    def _table(self, epoch: int) -> list[list[int]]:
        if self._drawn is None or self._drawn[0] != epoch:
            # Two multiplications apart, so that (seed, epoch) and (seed + 1, epoch - 1) are different draws.
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            self._drawn = epoch, self._draw(len(self), generator)
        return self._drawn[1]

    def _draw(self, count: int, generator: torch.Generator | None) -> list[list[int]]:
        """Return (top, left, mirrored) of ``count`` images."""
        shifts = torch.randint(2 * self._padding + 1, (count, 2), generator=generator)
        mirrored = torch.randint(2 if self._mirror else 1, (count, 1), generator=generator)
        drawn: list[list[int]] = torch.cat([shifts, mirrored], 1).tolist()
        return drawn


@register_sampler
class AugmentedSampler(DistributedSampler[tuple[Tensor, ...]]):
    """`DistributedSampler` that asks for (epoch, index) instead of the index."""

    @override
    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())
