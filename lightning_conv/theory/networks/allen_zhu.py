"""``AllenZhuNet``: the fully connected ReLU network of Allen-Zhu, Li & Song 2019, with its gradient in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_conv.checked import SEED, checked, whole
from lightning_conv.losses.squared import HalfSumOfSquares
from lightning_conv.theory.networks.initialisation import gaussian, require_sizes


class AllenZhuNet(nn.Module):
    r"""h_0 = relu(A x), h_l = relu(W_l h_{l-1}) for l = 1..L, u = B h_L; no biases, and only the W_l are trained.

    The entries of A and W_l are drawn from N(0, 2/m) and those of B from N(0, 1/d), where m is the width and d the
    number of outputs. A and B are not trained (``requires_grad`` is off). At this initialisation |h_l| is about |x| in
    every layer. The theorems are about inputs that ``unit_inputs`` has normalised.

    Args:
        inputs: Length of an input x.
        width: Width m of every hidden layer.
        depth: Number L of trained hidden layers.
        outputs: Number d of outputs.
        seed: Seed of the initialisation; the global random state is not used.
        dtype: Type of the weights.

    Raises:
        ValueError: A size is not positive.

    Source: Allen-Zhu, Li, Song 2019 (arXiv 1811.03962), section 2.

    Example:
        >>> net = AllenZhuNet(3, 8, 2, 1)
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['hidden.0.weight', 'hidden.1.weight']
    """

    @checked(inputs=whole(1), width=whole(1), depth=whole(1), outputs=whole(1), seed=SEED)
    def __init__(
        self, inputs: int, width: int, depth: int, outputs: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> None:
        require_sizes(inputs=inputs, width=width, depth=depth, outputs=outputs)
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        he = math.sqrt(2 / width)
        self.first = gaussian(inputs, width, he, generator, dtype)
        self.hidden = nn.ModuleList(gaussian(width, width, he, generator, dtype) for _ in range(depth))
        self.last = gaussian(width, outputs, 1 / math.sqrt(outputs), generator, dtype)
        self.first.requires_grad_(False)
        self.last.requires_grad_(False)
        # One module per layer, so that hooks see every activation.
        self.activations = nn.ModuleList(nn.ReLU() for _ in range(depth + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return u, (n, d), for x (n, inputs)."""
        for layer, activation in zip([self.first, *self.hidden], self.activations, strict=True):
            x = activation(layer(x))
        u: Tensor = self.last(x)
        return u

    @property
    def weights(self) -> list[Tensor]:
        """W_1..W_L, detached, each (m, m)."""
        return [layer.weight.detach() for layer in self.hidden]  # type: ignore[operator]

    @torch.no_grad()
    def states(self, x: Tensor) -> list[Tensor]:
        """Compute h_0..h_L, each (n, m), from their formula."""
        h = [torch.clamp(x @ self.first.weight.T, min=0)]
        for weight in self.weights:
            h.append(torch.clamp(h[-1] @ weight.T, min=0))
        return h

    @torch.no_grad()
    def objective(self, x: Tensor, y: Tensor) -> HalfSumOfSquares:
        r"""Compute F and its gradient without autograd.

        With e_i = B h_{i,L} - y_i, D_{i,l} = diag(1{(W_l h_{i,l-1})_k > 0}) and v_{i,L} = B^T e_i, v_{i,l-1} = W_l^T
        D_{i,l} v_{i,l},

        .. math:: \nabla_{W_l} F = \sum_i D_{i,l}\, v_{i,l}\, h_{i,l-1}^T .

        Args:
            x: Samples, (n, inputs).
            y: Targets, (n, d).

        Cost: 6 n m^2 L flops.

        Source: Allen-Zhu, Li, Song 2019, section 2: the chain rule with the diagonal sign matrices D.
        """
        h = self.states(x)
        error = h[-1] @ self.last.weight.T - y
        back, gradients = error @ self.last.weight, []
        for weight, below, here in zip(self.weights[::-1], h[-2::-1], h[:0:-1], strict=True):
            active = back * (here > 0)
            gradients.append(active.T @ below)
            back = active @ weight
        names = (f"hidden.{k}.weight" for k in range(len(self.hidden)))
        return HalfSumOfSquares((error.square().sum(1) / 2).double(), dict(zip(names, gradients[::-1], strict=True)))

    @torch.no_grad()
    def step(self, gradient: Mapping[str, Tensor], eta: float) -> None:
        """Perform one step of gradient descent on F, W_l <- W_l - eta dF/dW_l, in place."""
        for k, layer in enumerate(self.hidden):
            layer.weight.sub_(gradient[f"hidden.{k}.weight"], alpha=eta)  # type: ignore[operator]
