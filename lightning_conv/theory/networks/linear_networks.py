"""``LinearNetwork``: a product of matrices, trained as such."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_conv.theory.networks.initialisation import gaussian, require_sizes


class LinearNetwork(nn.Module):
    r"""u = W_L ... W_1 x, without biases.

    Args:
        sizes: (inputs, width_1, ..., outputs), at least two of them.
        std: standard deviation s of an entry at the start; with ``balanced`` the singular values of every W_l are s.
        balanced: draw W_l with W_{l+1}^T W_{l+1} = W_l W_l^T = s^2 P, so that the balancedness is zero at the start. Needs the
            hidden sizes to be at least as large as the smaller of the outer ones.
        seed: of the initialisation.
        dtype: of the weights.

    Raises:
        ValueError: fewer than two sizes, one that is not positive, or hidden sizes that cannot be balanced.

    Source: Saxe, McClelland, Ganguli 2014; Arora, Cohen, Hazan 2018 (arXiv 1802.06509).
    """

    def __init__(
        self, sizes: Sequence[int], *, std: float = 0.1, balanced: bool = False, seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        if len(sizes) < 2:
            raise ValueError(f"sizes: {tuple(sizes)}; need the number of inputs and of outputs at least")
        require_sizes(**{f"sizes[{k}]": size for k, size in enumerate(sizes)})
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(gaussian(before, after, std, generator, dtype) for before, after in pairwise(sizes))
        if balanced:
            self._balance(sizes, std, generator)

    @torch.no_grad()
    def _balance(self, sizes: Sequence[int], std: float, generator: torch.Generator) -> None:
        """W_l = s Q_l P Q_{l-1}^T with Q_l orthogonal and P the projector on the first k coordinates, k the smallest size.

        Raises:
            ValueError: a hidden size is smaller than both outer ones.
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
        """u, (n, outputs), for x (n, inputs)."""
        for layer in self.layers:
            x = layer(x)
        return x
