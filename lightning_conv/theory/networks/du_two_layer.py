"""The two-layer network of Du, Zhai, Poczos, Singh 2019 (1810.02054): ``DuTwoLayer``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_conv.checked import SEED, checked, real, whole
from lightning_conv.networks.activation import Activation
from lightning_conv.theory.networks.initialisation import undrawn


class DuTwoLayer(nn.Module):
    r"""u = (1 / sqrt m) sum_r a_r relu(w_r . x), w_r ~ N(0, kappa^2 I), a_r uniform on {-1, 1} and not trained.

    The theorems are about the loss S = 1/2 sum (u - y)^2 and samples of norm 1.

    Args:
        inputs: Length d of a sample.
        width: Number m of neurons.
        kappa: Scale of the hidden weights at the start. It is 1 in Du et al. A small one makes u(0) small, as Theorem
            4.1 of Arora et al. 2019 asks. The set of active neurons, and therefore H(0), does not depend on it.
        symmetric: Draw half of the neurons and give the other half the same w with -a, so that u(0) = 0 for every
            kappa.
        train_output: Train a as well (Theorem 3.3).
        activation: The elementwise function sigma; None: ReLU, as in the theorems.
        seed: Seed of the weights.
        dtype: Type of the weights. They are drawn in float64 and then rounded to it.

    Raises:
        ValueError: kappa is not positive, or the width is odd although the neurons are to be symmetric.

    Example:
        >>> network = DuTwoLayer(inputs=4, width=16)
        >>> [name for name, p in network.named_parameters() if p.requires_grad]
        ['hidden.weight']
    """

    @checked(inputs=whole(1), width=whole(1), kappa=real(above=0), seed=SEED)
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
            raise ValueError(f"width: {width}; symmetric neurons come in pairs; pass an even width")
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
        """Return u, one number per sample, (n,)."""
        result: Tensor = self.output(self.activation(self.hidden(x))).squeeze(-1) / math.sqrt(self.width)
        return result
