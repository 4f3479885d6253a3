"""The two-layer network of Du, Zhai, Poczos, Singh 2019 (1810.02054): ``DuTwoLayer``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_conv.networks.activation import Activation
from lightning_conv.theory.networks.initialisation import undrawn


class DuTwoLayer(nn.Module):
    r"""u = (1 / sqrt m) sum_r a_r relu(w_r . x), w_r ~ N(0, kappa^2 I), a_r uniform on {-1, 1} and not trained.

    The theorems are about the loss S = 1/2 sum (u - y)^2 and samples of norm 1.

    Args:
        inputs: d, the length of a sample.
        width: m.
        kappa: scale of the hidden weights at the start. 1 in Du et al.; a small one makes u(0) small, which Theorem 4.1 of
            Arora et al. 2019 asks for. Which neurons are active, and so H(0), does not depend on it.
        symmetric: draw half of the neurons and give the other half the same w with -a, so that u(0) = 0 at any kappa.
        train_output: whether a is trained too (Theorem 3.3).
        activation: elementwise sigma; None: ReLU, the theorems' own.
        seed: of the weights.
        dtype: of the weights; they are drawn in float64, so that another type has the same network, rounded.

    Raises:
        ValueError: kappa is not positive, or an odd width for symmetric neurons.

    Example:
        >>> network = DuTwoLayer(inputs=4, width=16)
        >>> [name for name, p in network.named_parameters() if p.requires_grad]
        ['hidden.weight']
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        kappa: float = 1.0,
        symmetric: bool = False,
        train_output: bool = False,
        activation: Activation | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if not kappa > 0:
            raise ValueError(f"kappa: {kappa}; need a positive scale of the hidden weights")
        if symmetric and width % 2:
            raise ValueError(f"width: {width}; symmetric neurons come in pairs, need an even one")
        self.hidden = undrawn(nn.Linear, inputs, width, bias=False)
        self.output = undrawn(nn.Linear, width, 1, bias=False).requires_grad_(train_output)
        self.activation: Activation = nn.ReLU() if activation is None else activation
        self.width = width
        self.to(dtype)
        generator = torch.Generator().manual_seed(seed)
        drawn = width // 2 if symmetric else width
        w = kappa * torch.randn(drawn, inputs, generator=generator, dtype=torch.float64)
        a = 2 * torch.randint(2, (drawn,), generator=generator) - 1
        with torch.no_grad():
            self.hidden.weight.copy_(torch.cat([w, w]) if symmetric else w)
            self.output.weight.copy_((torch.cat([a, -a]) if symmetric else a)[None])

    def forward(self, x: Tensor) -> Tensor:
        """u, one number a sample: (n,)."""
        result: Tensor = self.output(self.activation(self.hidden(x))).squeeze(-1) / math.sqrt(self.width)
        return result
