"""``BiasedTwoLayer``: one hidden ReLU layer whose biases all start at the same constant (Yang et al. 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_conv.checked import SEED, checked, real, whole
from lightning_conv.theory.networks.initialisation import gaussian, require_sizes, signs, undrawn


class BiasedTwoLayer(nn.Module):
    r"""f(x) = (1/sqrt m) sum_r a_r relu(w_r . x - b_r), with w_r ~ N(0, I), a_r = +-1 fixed and b_r = B at the start.

    W and b are trained. A unit is active on x where w_r . x > b_r. For |x| = 1 this has probability 1 - Phi(B) at the
    start, Phi being the standard normal distribution function. The bias of the torch layer is -b.

    Args:
        inputs: Length of an input x.
        width: Number m of units.
        threshold: B; 0 gives the usual network without sparsity.
        seed: Seed of the initialisation; networks that differ only in B get the same w and a.
        dtype: Type of the weights.

    Raises:
        ValueError: A size is not positive.

    Source: Yang, Jiang, Zhang, Liang, Wang 2023 (arXiv 2301.00327).
    """

    @checked(inputs=whole(1), width=whole(1), threshold=real(), seed=SEED)
    def __init__(
        self, inputs: int, width: int, threshold: float, *, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> None:
        require_sizes(inputs=inputs, width=width)
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = gaussian(inputs, width, 1.0, generator, dtype).weight.detach()
        self.hidden = undrawn(nn.Linear, inputs, width, dtype=dtype)
        with torch.no_grad():
            self.hidden.weight.copy_(drawn)
            self.hidden.bias.fill_(-threshold)
        self.activation = nn.ReLU()
        self.register_buffer("a", signs(width, generator, dtype))
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x_i), (n, 1), for x (n, inputs)."""
        h: Tensor = self.activation(self.hidden(x))
        a: Tensor = self.a  # type: ignore[assignment]
        return (h @ a)[:, None] / math.sqrt(len(a))
