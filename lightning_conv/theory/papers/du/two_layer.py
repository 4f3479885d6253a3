r"""``TwoLayerDescent``: gradient descent on the two-layer ReLU network, at a cost independent of the input dimension.

The network is that of Du, Zhai, Poczos, Singh 2019 (1810.02054).

One step of size eta on S = 1/2 sum (u - y)^2 is, with r = u - y and D_r = diag(1{w_r . x_i > 0}),

.. math:: w_r \leftarrow w_r - \frac{\eta \, a_r}{\sqrt m} X^T D_r \, r.

Every w_r stays in w_r(0) plus the span of the samples: w_r = w_r(0) + X^T c_r. So z_r = X w_r and c_r follow

.. math::
    c_r \leftarrow c_r - \frac{\eta \, a_r}{\sqrt m} D_r \, r, \qquad
    z_r \leftarrow z_r - \frac{\eta \, a_r}{\sqrt m} (X X^T) D_r \, r,

which is the same descent, with 2 n^2 m flops per step instead of 4 n d m. |w_r - w_r(0)|^2 = c_r^T X X^T c_r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.networks.activation import is_relu
from lightning_conv.theory.networks import DuTwoLayer

BLOCK = 4096
"""Number of neurons that are updated at once, so that their numbers stay in the cache."""


class TwoLayerDescent:
    """State of a run of gradient descent: pre-activations and coefficients of every neuron, in float64.

    Args:
        network: The network at its start, with ReLU and an output layer that is not trained. It is not changed.
        x: n samples, (n, d).
        y: Targets, (n,).

    Attributes:
        outputs: u, (n,).
        steps: Number of steps taken.

    Raises:
        ValueError: The activation is not ReLU, the output layer is trained, or the shapes are not (n, d) and (n,).

    Example:
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> run = TwoLayerDescent(DuTwoLayer(3, 100), x, torch.ones(3))
        >>> before = float(run.residual.norm())
        >>> for _ in range(10):
        ...     run.step(0.5)
        >>> float(run.residual.norm()) < before
        True
    """

    def __init__(self, network: DuTwoLayer, x: Tensor, y: Tensor) -> None:
        if not is_relu(network.activation) or network.output.weight.requires_grad:
            raise ValueError(
                "network: need ReLU and an output layer that is not trained; train another one by autograd"
            )
        if x.ndim != 2 or y.shape != (len(x),):
            raise ValueError(f"x, y: shapes {tuple(x.shape)}, {tuple(y.shape)}; need (n, d) and (n,)")
        self._x, self._y = x.detach().double(), y.detach().double()
        self._products = self._x @ self._x.T
        self._start = network.hidden.weight.detach().double().clone()
        self._signs = network.output.weight.detach().double()[0] / math.sqrt(network.width)
        self._z = self._start @ self._x.T  # (m, n)
        self._c = torch.zeros_like(self._z)
        self._active_at_start = self._z >= 0
        self.steps = 0
        self.outputs = self._signs @ self._z.clamp(min=0)

    @property
    def width(self) -> int:
        """Number m of neurons."""
        return len(self._z)

    @property
    def residual(self) -> Tensor:
        """r = u - y, (n,)."""
        return self.outputs - self._y

    def step(self, eta: float) -> None:
        """Perform one step of gradient descent.

        Args:
            eta: Step size on S.

        Cost: 2 n^2 m flops.
        """
        pull = -eta * self.residual
        outputs = torch.zeros_like(self.outputs)
        for start in range(0, self.width, BLOCK):
            block = slice(start, start + BLOCK)
            z, signs = self._z[block], self._signs[block]
            change = torch.outer(signs, pull).mul_(z > 0)
            self._c[block] += change
            z.addmm_(change, self._products)
            outputs += signs @ z.clamp(min=0)
        self.outputs = outputs
        self.steps += 1

    def gram(self) -> Tensor:
        """Compute the kernel H, (n, n), at the current weights. Cost: 2 n^2 m flops."""
        both = torch.zeros_like(self._products)
        for start in range(0, self.width, BLOCK):
            active = (self._z[start : start + BLOCK] > 0).double()
            both.addmm_(active.T, active)
        return self._products * both / self.width

    def pattern_changes(self) -> float:
        """Compute the share of (sample, neuron) pairs whose activation has changed since the start."""
        return float(((self._z >= 0) != self._active_at_start).double().mean())

    def neuron_movement(self) -> Tensor:
        """Compute |w_r - w_r(0)|_2 of every neuron, (m,)."""
        squares = ((self._c @ self._products) * self._c).sum(1)
        return squares.clamp(min=0).sqrt()

    def weight(self) -> Tensor:
        """Compute the hidden weights W, (m, d)."""
        return self._start + self._c @ self._x
