"""``LinearNetwork``: a product of matrices in which every factor is trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_conv.checked import SEED, checked, real
from lightning_conv.theory.networks.initialisation import gaussian, require_sizes


class LinearNetwork(nn.Module):
    r"""u = W_L ... W_1 x, without biases.

    Args:
        sizes: The sizes (inputs, width_1, ..., outputs), two or more.
        std: Standard deviation s of an entry at the start; with ``balanced``, the value of all nonzero singular values
            of W_l.
        balanced: Draw W_l with W_{l+1}^T W_{l+1} = W_l W_l^T = s^2 P for a projector P, so that the balancedness is
            zero at the start. No hidden size may be smaller than both the number of inputs and the number of outputs.
        seed: Seed of the initialisation.
        dtype: Type of the weights.

    Raises:
        ValueError: There are fewer than two sizes, a size is not positive, or the hidden sizes are too small for
            ``balanced``.

    Source: Saxe, McClelland, Ganguli 2014; Arora, Cohen, Hazan 2018 (arXiv 1802.06509).
    """

    @checked(std=real(least=0), seed=SEED)
    def __init__(
        self,
        sizes: Sequence[int],
        *,
        std: float = 0.1,
        balanced: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if len(sizes) < 2:
            raise ValueError(f"sizes: {tuple(sizes)}; pass at least the number of inputs and the number of outputs")
        require_sizes(**{f"sizes[{k}]": size for k, size in enumerate(sizes)})
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(gaussian(before, after, std, generator, dtype) for before, after in pairwise(sizes))
        if balanced:
            self._balance(sizes, std, generator)

    @torch.no_grad()
    def _balance(self, sizes: Sequence[int], std: float, generator: torch.Generator) -> None:
        """Set W_l = s Q_l P Q_{l-1}^T, with Q_l orthogonal and P of the rank of the smallest size.

        Raises:
            ValueError: A hidden size is smaller than both the number of inputs and the number of outputs.
        """
        rank = min(sizes)
        if len(sizes) > 2 and rank < min(sizes[0], sizes[-1]):
            raise ValueError(
                f"sizes: {tuple(sizes)}; balanced needs hidden sizes of {min(sizes[0], sizes[-1])} or more"
            )
        frames = [
            torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0] for size in sizes
        ]
        for layer, before, after in zip(self.layers, frames[:-1], frames[1:], strict=True):
            layer.weight.copy_(std * after @ before.T)  # type: ignore[operator]

    @property
    def weights(self) -> list[Tensor]:
        """W_1..W_L, detached, W_l of shape (size_l, size_{l-1})."""
        return [layer.weight.detach() for layer in self.layers]  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Return u, (n, outputs), for x (n, inputs)."""
        for layer in self.layers:
            x = layer(x)
        return x
