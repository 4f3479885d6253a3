"""``SymmetricTwoLayer``: the two-layer network of Nitanda & Suzuki 2021, whose output is zero at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_conv.networks.activation import derivative


class SymmetricTwoLayer(nn.Module):
    r"""g(x) = (1/sqrt M) sum_r a_r s(<b_r, x> + gamma c_r) with a symmetric initialisation, for which g_0 = 0.

    The first half of the units starts with a_r = R, the second half with a_r = -R and the same b_r, drawn uniformly
    from the sphere; c_r = 0. All of a, b and c are trained. As the width grows, the NTK at the start tends to E[s(b.x)
    s(b.x')] + R^2 (x.x' + gamma^2) E[s'(b.x) s'(b.x')].

    Args:
        inputs: Dimension d of a sample.
        width: Number M of units, even.
        activation: The function s, smooth, with |s'| <= 2 and |s(u)| <= 1 + |u|; None: tanh.
        scale: Size R of the initial output weights, |a_r| = R.
        gamma: Scale of the biases.
        generator: Draws b; None: the global random state.

    Raises:
        ValueError: The width is odd or below 2.

    Source: Nitanda & Suzuki 2021, section 2.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        activation: nn.Module | None = None,
        scale: float = 1.0,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width: {width}; a symmetric initialisation needs an even number of units, 2 or more")
        half = torch.randn(width // 2, inputs, generator=generator, dtype=torch.float64)
        half /= half.norm(dim=1, keepdim=True)
        signs = torch.ones(width // 2, dtype=torch.float64)
        self.b = nn.Parameter(torch.cat([half, half]))
        self.c = nn.Parameter(torch.zeros(width, dtype=torch.float64))
        self.a = nn.Parameter(scale * torch.cat([signs, -signs]))
        self.gamma, self.width = gamma, width
        self.activation = nn.Tanh() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """Return g(x_i), (n, 1), for x (n, d)."""
        hidden: Tensor = self.activation(x @ self.b.T + self.gamma * self.c)
        return (hidden @ self.a / math.sqrt(self.width))[:, None]

    @torch.no_grad()
    def kernel(self, inputs: Tensor, others: Tensor | None = None) -> Tensor:
        """Compute the NTK at the current weights, 1/M sum_r [s s' + a_r^2 (x.x' + gamma^2) s'(z_r) s'(z'_r)], (n, m).

        Args:
            inputs: Samples, (n, d).
            others: Samples, (m, d); None: ``inputs``.

        Cost: O(n m M) flops; no Jacobian is formed.
        """
        others = inputs if others is None else others
        z, z_of_others = (x @ self.b.T + self.gamma * self.c for x in (inputs, others))
        value, slope = self.activation(z), derivative(self.activation, z)
        value_of_others, slope_of_others = self.activation(z_of_others), derivative(self.activation, z_of_others)
        first = (slope * self.a.square()) @ slope_of_others.T
        kernel: Tensor = (value @ value_of_others.T + (inputs @ others.T + self.gamma**2) * first) / self.width
        return kernel
