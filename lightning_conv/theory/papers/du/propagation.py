"""Propagation of a movement of the weights to the last features, in the networks ``DuFC`` and ``DuResNet``.

The lemmas are from Du, Lee, Li, Wang, Zhai 2019 (1811.03804).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.networks.activation import derivative
from lightning_conv.theory.networks import DuConvResNet, DuFC, DuNetwork
from lightning_conv.theory.papers.du.movement import C_X0, spectral_size


def feature_sensitivity(network: DuNetwork, x: Tensor) -> Tensor:
    r"""Compute sqrt(m) |d x^(H)_i / d(W^(1), ..., W^(H))|_2 of every sample, the first-order factor of Lemma B.3.

    If all weights together move by sqrt(m) R in the Frobenius norm, the last features move by at most this factor times
    R, to first order in R, and some movement attains it. With J_h = d x^(H) / d x^(h) and D_h = s_h
    diag(sigma'(z^(h))), where s_h is the scale of the layer,

    .. math::
        \frac{\partial x^{(H)}}{\partial W} \Bigl(\frac{\partial x^{(H)}}{\partial W}\Bigr)^T
        = \sum_h |x^{(h-1)}|^2 J_h D_h D_h^T J_h^T .

    Args:
        network: A fully connected or residual network.
        x: n samples, (n, d).

    Returns:
        One factor per sample, (n,), float64.

    Raises:
        TypeError: The network is convolutional.

    Cost: 4 H m^3 flops and an eigenvalue problem of size m for each sample.
    """
    if isinstance(network, DuConvResNet):
        raise TypeError(
            "network: DuConvResNet; feature_sensitivity is for the networks of linear layers, DuFC and DuResNet"
        )
    found = []
    with torch.no_grad():
        features, pre_activations = network.states(x)
        for i in range(len(x)):
            downstream = torch.eye(network.width, dtype=torch.float64, device=x.device)
            total = torch.zeros_like(downstream)
            for h in range(network.depth, 0, -1):
                slopes = network.scale(h) * derivative(network.activation, pre_activations[h - 1][i].double())
                branch = downstream * slopes
                total.addmm_(branch, branch.T, alpha=float(features[h - 1][i].double().square().sum()))
                if h > 1:
                    through = branch @ network.hidden[h - 1].weight.double()  # type: ignore[operator]
                    downstream = through if network.c_res is None else downstream + through
            found.append(math.sqrt(network.width * max(float(torch.linalg.eigvalsh(total)[-1]), 0.0)))
    return torch.tensor(found, dtype=torch.float64)


def propagation_bound(network: DuFC, *, lipschitz: float = 1.0) -> float:
    r"""Compute the factor of R that bounds |x^(H)(k) - x^(H)(0)| in Lemma B.3, for the fully connected network.

    .. math:: \sqrt{c_\sigma} \, L \, c_{x,0} \sum_{h < H} c_x^h, \qquad c_x = 2 \sqrt{c_\sigma} \, L \, c_{w,0}

    with c_{w,0} = max_h |W^(h)(0)|_2 / sqrt(m) of this network and c_{x,0} = 2. No layer may move by more than sqrt(m)
    R. The factor is exponential in the depth H.

    Args:
        network: The network at its start.
        lipschitz: Lipschitz constant L of sigma: 1 for softplus, tanh and ReLU.

    Raises:
        TypeError: The network is not the fully connected one.

    Source: Du, Lee, Li, Wang, Zhai 2019 (1811.03804), Lemma B.3.
    """
    if not isinstance(network, DuFC):
        raise TypeError(f"network: {type(network).__name__}; Lemma B.3 is about the fully connected network, DuFC")
    c_x = 2 * math.sqrt(network.c_sigma) * lipschitz * spectral_size(network)
    return math.sqrt(network.c_sigma) * lipschitz * C_X0 * sum(c_x**h for h in range(network.depth))
