"""The positive initialisation, and the size of its output weights from which on the proof succeeds."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_conv.theory.criterion import Criterion, not_applicable
from lightning_conv.theory.papers.chatterjee.certificate import affine_independence, certify_descent
from lightning_conv.theory.papers.chatterjee.ratio import SOURCE
from lightning_conv.theory.tools.smooth_mlp import SmoothMLP, linear_chain, read_mlp

LARGEST_WEIGHT = 1e12
"""Largest output weight that the search tries."""


@torch.no_grad()
def positive_init_(model: nn.Module, *, A: float, kappa: float = 1.0, spread: float = 0.5, seed: int = 0) -> None:
    """Set the weights to Chatterjee's positive initialisation, in place.

    W_1 = 0 and all biases are 0. The entries of W_2..W_{L-1} are uniform in [kappa, (1 + spread) kappa], those of W_L
    in [A, (1 + spread) A]. For activations with s(0) = 0 the network is then zero for every A, so f(x_0) = mean y^2
    does not change while alpha grows as A^2. Equal weights (``spread`` 0) would keep all units of a layer equal for
    ever.

    Args:
        model: See ``read_mlp``.
        A: Least output weight; ``smallest_output_weight`` finds the one from which on descent is proven on given data.
        kappa: Least hidden weight.
        spread: Relative width of the intervals.
        seed: Seed of the weights; the global random state is not used.

    Raises:
        ValueError: The model is of another kind, ``A`` or ``kappa`` is not positive, or ``spread`` is negative.

    Source: Chatterjee 2203.16462 (zero first layer, positive hidden weights, large output weights).
    """
    read_mlp(model)
    if not (A > 0 and kappa > 0 and spread >= 0):
        raise ValueError(f"A, kappa, spread: {A}, {kappa}, {spread}; need positive weights and a spread of 0 or more")
    layers = [module for module in linear_chain(model) if isinstance(module, nn.Linear)]
    generator = torch.Generator().manual_seed(seed)
    for place, layer in enumerate(layers):
        least = 0.0 if place == 0 else A if place == len(layers) - 1 else kappa
        shares = torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64)
        layer.weight.copy_(least * (1 + spread * shares))
        if layer.bias is not None:
            layer.bias.zero_()


def judge_positive_start(model: nn.Module | SmoothMLP) -> Criterion:
    """Judge whether the current weights are Chatterjee's positive initialisation.

    The theorem on feedforward networks requires W_1 = 0, zero biases, positive entries of W_2..W_L and s(0) = 0; s' > 0
    is true of every activation of ``read_mlp``. How large the entries of W_L must be depends on the data;
    ``certify_descent`` decides it.

    Args:
        model: See ``read_mlp``.

    Returns:
        ``certified`` if the weights are exactly so. ``not applicable`` for another start, which this theorem does not
        cover. ``measured`` is the least entry of W_2..W_L.

    Raises:
        ValueError: The network is of another kind.

    Source: Chatterjee 2203.16462.
    """
    mlp = model if isinstance(model, SmoothMLP) else read_mlp(model)
    least = min(float(layer.weight.min()) for layer in mlp.layers[1:])
    broken = []
    if (first := float(mlp.first.weight.abs().max())) > 0:
        broken.append(f"W_1 has entries up to {first:.4g} and must be 0")
    if (bias := max(float(layer.bias.abs().max()) for layer in mlp.layers)) > 0:
        broken.append(f"biases are up to {bias:.4g} and must be 0")
    if not least > 0:
        broken.append(f"a weight after the first layer is {least:.4g}, not positive")
    if any(s.at_zero != 0 for s in mlp.activations):
        broken.append("an activation has s(0) != 0")
    asks = "W_1 = 0, b = 0, W_2..W_L > 0, s(0) = 0, s' > 0 at the start"
    if broken:
        return not_applicable("positive_start", SOURCE, asks, "another start: " + "; ".join(broken), least)
    output = float(mlp.last.weight.min())
    reason = f"it is exactly the positive initialisation; the least output weight A is {output:.4g}"
    return Criterion("positive_start", SOURCE, asks, least, 0.0, "certified", reason)


def smallest_output_weight(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    epsilon: float = 0.5,
    kappa: float = 1.0,
    spread: float = 0.5,
    seed: int = 0,
    tolerance: float = 0.01,
) -> float:
    """Find the smallest A, up to ``tolerance``, for which ``certify_descent`` succeeds after ``positive_init_``.

    For large A the score is proportional to A^2 (only W_L changes), so doubling finds an A that is large enough and
    bisection the smallest one.

    Args:
        model: The architecture; the model is not changed.
        inputs: Samples, (n, d), affinely independent.
        targets: y, n numbers.
        epsilon: See ``certify_descent``.
        kappa: See ``positive_init_``.
        spread: See ``positive_init_``.
        seed: See ``positive_init_``.
        tolerance: Relative tolerance of A.

    Raises:
        ValueError: An activation has s(0) != 0, the inputs are not proven independent, or no A up to 1e12 is enough.

    Cost: about twenty certificates.
    """
    mlp = read_mlp(model)
    if any(s.at_zero != 0 for s in mlp.activations):
        raise ValueError(
            "model: an activation has s(0) != 0, so the loss at the start grows with the output weights; use tanh, or shift the activation"
        )
    data = affine_independence(inputs, bias=mlp.first.bias_trained)
    if data.verdict != "certified":
        raise ValueError(f"inputs: not proven independent, so no output weight is enough: {data.reason}")
    trial = copy.deepcopy(model).double()

    def holds(weight: float) -> bool:
        positive_init_(trial, A=weight, kappa=kappa, spread=spread, seed=seed)
        return certify_descent(trial, inputs, targets, epsilon=epsilon, data=data).holds

    high = 1.0
    while not holds(high):
        high *= 2
        if high > LARGEST_WEIGHT:
            raise ValueError(
                f"inputs: no output weight up to {LARGEST_WEIGHT:.0e} is enough; sigma_min of [X, 1] is {data.sigma_min}"
            )
    low = high / 2
    while holds(low):
        high, low = low, low / 2
    while high > low * (1 + tolerance):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
