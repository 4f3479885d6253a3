"""The kernel of the proofs: H(k) of the two-layer network and G^(H)(k) of the deep ones, by the Hadamard formula.

H(k) is from Du, Zhai, Poczos, Singh 2019 (1810.02054), G^(H)(k) from Du, Lee, Li, Wang, Zhai 2019 (1811.03804).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional

from lightning_conv.networks.activation import derivative
from lightning_conv.networks.precision import in_float64
from lightning_conv.theory.networks import DuConvResNet, DuNetwork, DuTwoLayer


def hadamard_gram(inputs: Tensor, cotangents: Tensor) -> Tensor:
    r"""Compute the kernel of a linear layer z = W x, the entrywise product of X X^T and D D^T with D_i = du_i / dz_i.

    .. math:: \Bigl\langle \frac{\partial u_i}{\partial W}, \frac{\partial u_j}{\partial W} \Bigr\rangle = (x_i \cdot x_j)(D_i \cdot D_j)

    Args:
        inputs: The inputs X of the layer, (n, d); or (n, p, d) for a layer that is applied at p positions, in which
            case the kernel is summed over all pairs of positions.
        cotangents: The gradients D, (n, m) or (n, p, m).

    Returns:
        The kernel, (n, n), float64, exactly symmetric.

    Raises:
        ValueError: The shapes do not match.

    Cost: n^2 p^2 (d + m) multiplications and, for p > 1, 2 (n p)^2 numbers.

    Example:
        >>> hadamard_gram(torch.eye(2), torch.ones(2, 3))
        tensor([[3., 0.],
                [0., 3.]], dtype=torch.float64)
    """
    if inputs.ndim not in (2, 3) or inputs.shape[:-1] != cotangents.shape[:-1]:
        raise ValueError(
            f"cotangents: shape {tuple(cotangents.shape)} for inputs of {tuple(inputs.shape)}; need (n, m) for (n, d), "
            "or (n, p, m) for (n, p, d)"
        )
    n = len(inputs)
    x, d = (in_float64(t).reshape(-1, t.shape[-1]) for t in (inputs, cotangents))
    product = (x @ x.T) * (d @ d.T)
    if inputs.ndim == 3:
        product = product.view(n, inputs.shape[1], n, inputs.shape[1]).sum((1, 3))
    return (product + product.T) / 2


def last_hidden_gram(network: DuNetwork | DuTwoLayer, x: Tensor) -> Tensor:
    r"""Compute G^(H), the kernel of the last hidden layer's weights, of a network of Du et al. (two layers: H(k)).

    .. math::
        G^{(H)}_{ij} = (x^{(H-1)}_i \cdot x^{(H-1)}_j) \, s^2
        \sum_r a_r^2 \sigma'(w_r \cdot x_i^{(H-1)}) \sigma'(w_r \cdot x_j^{(H-1)})

    with s^2 = c_sigma / m (fully connected), c_res^2 / (H^2 m) (a residual branch) or 1 / m (two layers, where
    a_r^2 = 1). In the convolutional network x is a patch, and the sum runs over all pairs of positions s, t, with
    a_r(s) a_r(t) in place of a_r^2.

    The computation is in float64 for weights of any type. On Apple's GPUs, which have no float64, it runs on the CPU.
    ``ntk_gram(network, x, parameters=...)`` gives the same matrix for any network.

    Args:
        network: One of the modules of ``lightning_conv.theory``.
        x: Inputs of the n samples.

    Cost: one forward pass and n^2 (d + m) multiplications; (n p)^2 (k^2 m + m) multiplications for the convolutional
    network.

    Source: Du, Lee, Li, Wang, Zhai 2019 (1811.03804), section 4; Du, Zhai, Poczos, Singh 2019 (1810.02054), eq. (6).
    """
    if any(p.dtype != torch.float64 for p in network.parameters()):
        network = copy.deepcopy(network)
        network = (network.cpu() if network.output.weight.device.type == "mps" else network).double()
    x = in_float64(x)
    a = network.output.weight.detach()
    with torch.no_grad():
        if isinstance(network, DuTwoLayer):
            slopes = derivative(network.activation, network.hidden(x)) / math.sqrt(network.width)
            return hadamard_gram(x, a * slopes)
        features, pre_activations = network.states(x)
        slopes = network.scale(network.depth) * derivative(network.activation, pre_activations[-1])
        cotangents = a.view(slopes.shape[1:]) * slopes
        if not isinstance(network, DuConvResNet):
            return hadamard_gram(features[-2], cotangents)
        size = network.kernel_size
        patches = functional.unfold(features[-2], size, padding=size // 2)
        return hadamard_gram(patches.transpose(1, 2), cotangents.flatten(2).transpose(1, 2))
