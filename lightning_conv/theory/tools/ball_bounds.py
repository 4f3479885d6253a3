"""Proven bounds of a smooth network everywhere in a ball around its weights: ``ball_bounds``.

The ball is |theta - theta_0| <= r over all trained weights together. Every number is a proven bound, rounding included
(``smooth_mlp.OUTWARD``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.linalg.rounding import gamma
from lightning_conv.theory.tools.smooth_mlp import AffineLayer, SmoothMLP, above, below, spectral_norm_bound


@dataclass(frozen=True)
class BallBounds:
    """Bounds that are valid at every point of the ball, for each of n samples."""

    radius: float
    first_layer_gain: float
    """Lower bound of min_i |du_i / dz_1|. It needs positive weights; 0: there is no bound."""
    jacobian_norm: float  # upper bound of |J|_2 with J = du/dtheta, (n, P)
    curvature: float  # upper bound of max_i |Hess u_i|_2
    reason: str = ""  # explains why the gain is 0


@dataclass(frozen=True)
class _Forward:
    """Upper bounds of the states in the forward pass; lists by layer l = 1..L."""

    entering: list[Tensor]  # |h_{l-1}| per sample, (n,)
    largest: list[float]  # |z_l|_inf over samples; of the activations' layers only


def ball_bounds(mlp: SmoothMLP, inputs: Tensor, radius: float, *, input_norm: float | None = None) -> BallBounds:
    r"""Bound the gain, the Jacobian and the curvature of ``mlp`` on ``inputs`` for all weights within ``radius``.

    Notation: u is the output, z_l and h_l = s_l(z_l) are the pre-activations and states of layer l, m_l its width,
    W_l^0 and b_l^0 the weights and biases in the centre, S_l = sup s_l', B_l = sup |s_l''|, g_l = du/dz_l and
    a_l = du/dh_l = W_{l+1}^T g_{l+1}.

    *Forward.* |z_l| <= |W_l^0| |h_{l-1}| + |b_l^0| + r |(h_{l-1}, 1)| (in layer 1 the computed z_1 of the centre takes
    the index of the first two terms), |h_l| <= min(|s_l(0)| sqrt(m_l) + S_l |z_l|, sup|s_l| sqrt(m_l)).

    *Gain.* g_1 = s_1'(z_1) o v with v = W_2^T D_2 W_3^T ... W_L^T, D_l = diag(s_l'(z_l)). If W_3..W_L stay
    non-negative, so does every factor of v from the right, and with sums instead of norms

    .. math:: |v| \ge \frac{1}{\sqrt{m_1}} \sum_j v_j \ge \Bigl(\frac{\rho_2}{\sqrt{m_1}} - r\Bigr) \prod_{l=3}^{L-1}
        \sigma_{l-1} (\rho_l - r \sqrt{m_{l-1}}) \; \sigma_{L-1} \Bigl(\sum_k W_{L,k}^0 - r \sqrt{m_{L-1}}\Bigr),

    where rho_l is the smallest row sum of W_l^0 and sigma_l = min s_l' over the pre-activations that can occur. For
    L = 2 it is |v| >= |W_2^0| - r for weights of any sign. Then |g_1| >= sigma_1 |v|. This bound is at least the
    product of the smallest entries A and kappa, sqrt(m_1) (A - r) (kappa - r)^{L-2} m_2 ... m_{L-1} prod sigma_l, and
    valid for larger r.

    *Jacobian.* J J^T is a sum over layers of (H H^T) o (g g^T) with H = (h_{l-1}, 1). Schur's product theorem gives
    |J|^2 <= sum_l max_i |g_l|^2 |H_{l-1}|^2, where |g_l| <= S_l (|W_{l+1}^0| + r) |g_{l+1}|.

    *Curvature.* Along a direction of unit length that moves layer l by d_l (sum d_l^2 = 1), |z_l'| <= c_l . d with
    c_l = |(h_{l-1}, 1)| e_l + (|W_l^0| + r) S_{l-1} c_{l-1}, and

    .. math:: |u''| \le \sum_{l<L} |a_l|_\infty B_l |z_l'|^2 + 2 \sum_{l \ge 2} |g_l| d_l S_{l-1} |z_{l-1}'| = d^T Q d,

    so |Hess u_i| <= |Q|_F. These bounds are derived here, not taken from a paper.

    Args:
        mlp: The network, with the weights in the centre of the ball.
        inputs: Samples, (n, d).
        radius: Radius r of the ball, 0 or more.
        input_norm: Upper bound of |(X, 1)|_2 over the trained part of layer 1, if it is known.

    Raises:
        ValueError: The shapes do not match, or the radius is negative.

    Cost: one forward pass, and an eigenvalue problem of the size of the smaller side of each weight matrix.
    """
    x = inputs.detach().cpu().double().flatten(1)
    if x.shape[1] != mlp.first.inputs:
        raise ValueError(f"inputs: {x.shape[1]} features, the network takes {mlp.first.inputs}")
    if not radius >= 0:
        raise ValueError(f"radius: {radius}; need 0 or more")
    forward = _forward(mlp, x, radius)
    gain, reason = _gain(mlp, forward, radius)
    g, a = _backward(mlp, radius)
    first = _norm_of_inputs(mlp.first, x) if input_norm is None else input_norm
    squares = [
        first**2,
        *(_square_of_inputs(layer, h) for layer, h in zip(mlp.layers[1:], forward.entering[1:], strict=True)),
    ]
    square = sum(gradient**2 * each for gradient, each in zip(g, squares, strict=True))
    if any(z > s.smooth_to for z, s in zip(forward.largest, mlp.activations, strict=True)):
        reason = "a pre-activation may reach the point where torch's softplus becomes linear"
        return BallBounds(radius, 0.0, math.inf, math.inf, reason)
    return BallBounds(radius, gain, above(math.sqrt(square)), _curvature(mlp, forward, g, a, radius), reason)


def _forward(mlp: SmoothMLP, x: Tensor, radius: float) -> _Forward:
    entering, largest = [_norms(x)], []
    for index, (layer, activation) in enumerate(zip(mlp.layers, mlp.activations, strict=False)):
        reach = radius * _reach(layer, entering[-1])
        if index == 0:
            z = x @ layer.weight.T + layer.bias
            rounding = gamma(layer.inputs + 2, torch.float64) * (
                layer.row_norm * entering[0] + float(layer.bias.abs().max())
            )
            size = _up(_norms(z) + math.sqrt(layer.outputs) * rounding + reach)
            peak = _up(z.abs().amax(1) + rounding + reach)
        else:
            size = _up(layer.norm * entering[-1] + float(layer.bias.norm()) + reach)
            peak = torch.minimum(_up(layer.row_norm * entering[-1] + float(layer.bias.abs().max()) + reach), size)
        largest.append(float(peak.max()))
        root = math.sqrt(layer.outputs)
        size = _up(activation.at_zero * root + activation.most_slope * size)
        entering.append(size.clamp(max=above(activation.limit * root)))
    return _Forward(entering, largest)


def _gain(mlp: SmoothMLP, forward: _Forward, radius: float) -> tuple[float, str]:
    slopes = [s.least_slope(z) for s, z in zip(mlp.activations, forward.largest, strict=True)]
    moved = [radius if layer.weight_trained else 0.0 for layer in mlp.layers]
    if mlp.depth == 2:
        gain = below(float(mlp.last.weight.norm())) - above(moved[1])
        reason = "" if gain > 0 else "the output weights can all become zero within the ball"
        return max(gain, 0.0) * below(slopes[0]), reason
    for index in range(2, mlp.depth):
        if float(mlp.layers[index].weight.min()) < above(moved[index]):
            return 0.0, f"weights of layer {index + 1} can become negative within the ball"
    least = [below(float(layer.weight.clamp(min=0).sum(1).min())) for layer in mlp.layers]
    # Only the row sums of layer 2 count, so it may have negative entries; they are subtracted in full.
    second = mlp.layers[1].weight
    least[1] -= above(float((-second).clamp(min=0).sum(1).max()))
    width = math.sqrt(mlp.layers[1].inputs)
    gain = below(least[1] / width) - above(moved[1]) if least[1] > 0 else 0.0
    for index in range(2, mlp.depth):
        gain *= max(least[index] - above(moved[index] * math.sqrt(mlp.layers[index].inputs)), 0.0)
    gain = below(max(gain, 0.0) * math.prod(slopes))
    return gain, "" if gain > 0 else "sums of weights can become zero within the ball"


def _backward(mlp: SmoothMLP, radius: float) -> tuple[list[float], list[float]]:
    """Bound |g_l|, l = 1..L, and |a_l|_inf, l = 1..L-1, from above."""
    g, a = [1.0], [above(float(mlp.last.weight.abs().max()) + radius)]
    for index in range(mlp.depth - 2, -1, -1):
        following = mlp.layers[index + 1]
        if index < mlp.depth - 2:
            a.insert(0, above((following.column_norm + radius) * g[0]))
        g.insert(0, above(mlp.activations[index].most_slope * (following.norm + radius) * g[0]))
    return g, a


def _curvature(mlp: SmoothMLP, forward: _Forward, g: list[float], a: list[float], radius: float) -> float:
    q = torch.zeros(mlp.depth, mlp.depth, dtype=torch.float64)
    c = torch.zeros(mlp.depth, dtype=torch.float64)
    for index, layer in enumerate(mlp.layers):
        before = c * (mlp.activations[index - 1].most_slope if index else 0.0)
        if layer.weight_trained and index:
            q[index] += g[index] * before
            q[:, index] += g[index] * before
        c = before * above(layer.norm + radius)
        c[index] += float(_reach(layer, forward.entering[index]).max())
        if index < mlp.depth - 1:
            q += a[index] * mlp.activations[index].most_bend * torch.outer(c, c)
    return above(above(float(q.norm())))


def _reach(layer: AffineLayer, entering: Tensor) -> Tensor:
    """Bound |(h, 1)| of the trained part per sample, (n,): the movement of z if the layer moves by 1."""
    square = entering.square() * float(layer.weight_trained) + float(layer.bias_trained)
    return _up(square.sqrt())


def _norm_of_inputs(layer: AffineLayer, x: Tensor) -> float:
    """Bound |(X, 1)|_2 of the trained part from above."""
    trained = x if layer.weight_trained else x[:, :0]
    columns = torch.cat([trained, x.new_ones(len(x), int(layer.bias_trained))], 1)
    return spectral_norm_bound(columns) if columns.numel() else 0.0


def _square_of_inputs(layer: AffineLayer, entering: Tensor) -> float:
    """Bound |(h, 1)|_F^2 of the trained part from above."""
    return above(float(entering.square().sum()) * layer.weight_trained + len(entering) * layer.bias_trained)


def _norms(rows: Tensor) -> Tensor:
    return _up(rows.norm(dim=1))


def _up(values: Tensor) -> Tensor:
    return values * above(1.0)
