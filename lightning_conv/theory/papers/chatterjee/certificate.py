"""Proven lower bounds of alpha for smooth networks with one output, and the step size that they certify."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.expressivity import RankCertificate, certify_expressivity
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.theory.criterion import Criterion, Verdict
from lightning_conv.theory.papers.chatterjee.ratio import SOURCE, criterion_score, least_radius
from lightning_conv.theory.tools.ball_bounds import BallBounds, ball_bounds
from lightning_conv.theory.tools.running_error import jacobian_sigma_min, residual_with_error
from lightning_conv.theory.tools.smooth_mlp import SmoothMLP, above, below, read_mlp

POSITIVE = "first layer's Gram matrix, positive weights"
LIPSCHITZ = "sigma_min(J) at the centre less the Lipschitz constant of J times r"


@dataclass(frozen=True)
class DescentCertificate:
    """Proven statements about gradient descent on f = (1/n) sum (u_i - y_i)^2 from the network's current weights.

    If ``holds`` is true, descent with any constant step h up to ``step`` stays within ``radius``, obeys f_k <= (1 -
    delta)^k f_0 with delta = (1 - eps) alpha h, and converges to zero loss.
    """

    radius: float
    value: Bounded  # f(x_0)
    alpha: Bounded  # lower: proven on the ball
    smoothness: float  # proven upper bound of |Hess f|_2 on the points of the ball with a loss up to f(x_0)
    epsilon: float
    step: float  # 2 eps / smoothness, rounded down
    criterion: Criterion
    flow: Criterion  # the criterion for gradient flow, eps = 0

    @property
    def holds(self) -> bool:
        """Whether the criterion for descent is proven."""
        return self.criterion.verdict == "certified"

    @property
    def score(self) -> float:
        """Proven lower bound of (1 - eps)^2 r^2 alpha / (4 f_0); above 1 the criterion is proven."""
        return self.criterion.measured

    @property
    def rate(self) -> float:
        """(1 - eps) alpha h, the share of the loss that a step of size ``step`` certainly removes."""
        return below(below((1 - self.epsilon) * self.alpha.lower * self.step))

    @property
    def length(self) -> float:
        """2 sqrt(f_0 / alpha) / (1 - eps), an upper bound of the path length."""
        return above(least_radius(self.value.upper, self.alpha.lower, epsilon=self.epsilon))


def affine_independence(inputs: Tensor, *, bias: bool = True) -> RankCertificate:
    """Certify that n inputs are affinely (without ``bias``: linearly) independent, rank [X, 1] = n.

    This is the expressivity condition of the input layer, and needs n <= d + 1. The square of ``sigma_min.lower``
    bounds lambda_min([X, 1] [X, 1]^T) from below.

    Args:
        inputs: Samples, (n, ...), flattened to (n, d) and taken as exact numbers.
        bias: Whether the first layer's bias is trained.

    Cost: a singular value decomposition of n x (d + 1).

    Example:
        >>> affine_independence(torch.eye(4, 3)).verdict, affine_independence(torch.eye(4, 3), bias=False).verdict
        ('certified', 'refuted')
    """
    return certify_expressivity(inputs.detach().cpu().double().flatten(1), method="singular", bias=bias)


def certify_alpha(
    model: nn.Module | SmoothMLP,
    inputs: Tensor,
    radius: float,
    *,
    data: RankCertificate | None = None,
    sigma_min: Bounded | None = None,
) -> Bounded:
    r"""Prove a lower bound of alpha(x_0, r) for f = (1/n) sum (u_i - y_i)^2: the larger of two bounds.

    For a loss k f, multiply the bound by k.

    *Positive weights.* Let X~ = [X, 1] (X alone if the first bias is not trained), e = u - y, c_ij = du_i / dz_1j, and
    let the weights be non-negative from layer 3 on. Then

    .. math:: \frac{\partial f}{\partial \tilde W_{1,j}} = \frac2n \sum_i e_i c_{ij} \tilde x_i, \qquad
        |\nabla f|^2 \ge \frac{4}{n^2} \sum_j (c_j \circ e)^T \tilde X \tilde X^T (c_j \circ e)
        \ge \frac4n \lambda_{\min}(\tilde X \tilde X^T) \min_i \sum_j c_{ij}^2 \; f .

    ``ball_bounds`` bounds the last factor everywhere in the ball, for any targets.

    *Lipschitz Jacobian.* For any signs, J = du/dtheta moves by at most L |theta - theta_0| in the ball, L = sqrt(n)
    max_i |Hess u_i| of ``ball_bounds``, so by Weyl's inequality sigma_min(J) >= sigma_min(J_0) - L r, and

    .. math:: |\nabla f|^2 = \frac{4}{n^2} |J^T e|^2 \ge \frac4n (\sigma_{\min}(J_0) - L r)_+^2 \; f .

    [both derived]

    Args:
        model: The network with the weights x_0; see ``read_mlp``.
        inputs: Samples, (n, d).
        radius: Radius r of the ball around x_0, in weight space.
        data: ``affine_independence`` of the inputs, if it is already computed.
        sigma_min: ``jacobian_sigma_min``, if it is already computed.

    Returns:
        An interval from the proven bound to infinity. ``method`` says which of the two bounds it is, ``reason`` why a
        bound is 0.

    Raises:
        ValueError: The network is of another kind or has no trained weights, or the inputs do not match it.
    """
    mlp = model if isinstance(model, SmoothMLP) else read_mlp(model)
    _require_trained(mlp)
    data = data or affine_independence(inputs, bias=mlp.first.bias_trained)
    bounds = ball_bounds(mlp, inputs, radius)
    return _alpha(mlp, bounds, len(inputs), data, sigma_min or jacobian_sigma_min(mlp, inputs))


def certify_descent(
    model: nn.Module | SmoothMLP,
    inputs: Tensor,
    targets: Tensor,
    *,
    radius: float | None = None,
    epsilon: float = 0.5,
    data: RankCertificate | None = None,
) -> DescentCertificate:
    r"""Prove before the first step that gradient descent on f = (1/n) sum (u_i - y_i)^2 reaches zero loss.

    Let 4 f_0 < (1 - eps)^2 r^2 alpha with alpha as in ``certify_alpha``, and let |Hess f| <= M at all points of
    B(x_0, r) with f <= f_0. Then descent with h <= 2 eps / M obeys f_{k+1} <= f_k - (1 - eps) h |grad f_k|^2, stays in
    the ball and converges at the rate (1 - eps) alpha h. Proof: follow a step, x(t) = x_k - t grad f_k. As long as x(t)
    is in the ball with f <= f_0, Taylor's theorem gives

    .. math:: f(x(t)) \le f_k - t (1 - t M / 2) |\nabla f_k|^2 \le f_k - (1 - \varepsilon) t |\nabla f_k|^2 .

    So f decreases, and by ``length_bound`` the path so far is strictly shorter than
    2 sqrt(f_0 / alpha) / (1 - eps) < r. Hence x(t) cannot leave this set before t = h. [derived; the paper bounds the
    Hessian on B(x_0, 2r) instead, and bounds the step by r / sup |grad f| as well]

    M comes from the residual: |e| <= sqrt(n f_0) on this set, so with ``ball_bounds``

    .. math:: |\nabla^2 f| = \frac2n \Bigl| J^T J + \sum_i e_i \nabla^2 u_i \Bigr| \le \frac2n |J|^2 + 2 \sqrt{f_0} \,
        \max_i |\nabla^2 u_i| .

    Args:
        model: See ``certify_alpha``.
        inputs: Samples, (n, d).
        targets: y, n numbers.
        radius: r; None: the radius with the fastest certified rate, or, if none is certified, with the largest score.
        epsilon: Share of a step's first-order decrease that curvature may cancel, in (0, 1); 1/2 gives the best rate, less is easier.
        data: See ``certify_alpha``.

    Raises:
        ValueError: See ``certify_alpha``; or the number of targets is not n, or ``epsilon`` lies outside (0, 1).

    Cost: one forward and one backward pass, the singular values of the inputs, and small eigenvalue problems for about
    a hundred radii.
    """
    mlp = model if isinstance(model, SmoothMLP) else read_mlp(model)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: {epsilon}; need a number between 0 and 1")
    _require_trained(mlp)
    data = data or affine_independence(inputs, bias=mlp.first.bias_trained)
    start = _Start(mlp, inputs, _loss(mlp, inputs, targets), data, jacobian_sigma_min(mlp, inputs))
    if radius is not None:
        return _certificate(start, radius, epsilon)
    scale = max(float(layer.weight.norm()) for layer in mlp.layers) or 1.0
    grid = torch.logspace(math.log10(scale) - 6, math.log10(scale) + 0.5, 66, dtype=torch.float64).tolist()
    best = _best([_certificate(start, r, epsilon) for r in grid])
    fine = torch.logspace(-0.1, 0.1, 21, dtype=torch.float64).tolist()
    return _best([best, *(_certificate(start, best.radius * factor, epsilon) for factor in fine)])


@dataclass(frozen=True)
class _Start:
    """Quantities of a start that do not depend on the radius."""

    mlp: SmoothMLP
    inputs: Tensor
    value: Bounded
    data: RankCertificate
    sigma_min: Bounded


def _require_trained(mlp: SmoothMLP) -> None:
    if not any(layer.weight_trained or layer.bias_trained for layer in mlp.layers):
        raise ValueError(
            "model: all of its layers are frozen, so that there is no gradient; set requires_grad on at least one"
        )


def _best(found: list[DescentCertificate]) -> DescentCertificate:
    """Return the certificate with the fastest proven rate; if none is proven, the one with the largest score."""
    return max(found, key=lambda each: (each.holds, each.rate if each.holds else each.score))


def _alpha(mlp: SmoothMLP, bounds: BallBounds, samples: int, data: RankCertificate, sigma_min: Bounded) -> Bounded:
    """Compute the larger of the two bounds."""
    smallest = below(data.sigma_min.lower**2) if data.verdict == "certified" and data.sigma_min is not None else 0.0
    why = bounds.reason if smallest > 0 else f"the inputs are not proven independent: {data.reason}"
    if not mlp.first.weight_trained:
        smallest, why = 0.0, "the first layer is frozen"
    positive = below(4 / samples * smallest * bounds.first_layer_gain**2)
    lipschitz = above(math.sqrt(samples) * bounds.curvature)
    left = sigma_min.lower - above(lipschitz * bounds.radius)
    lazy = below(4 / samples * below(left) ** 2) if left > 0 else 0.0
    if lazy > positive:
        return Bounded(lazy, lazy, math.inf, True, LIPSCHITZ)
    return Bounded(positive, positive, math.inf, True, POSITIVE, "" if positive > 0 else why)


def _certificate(start: _Start, radius: float, epsilon: float) -> DescentCertificate:
    mlp, n, value = start.mlp, len(start.inputs), start.value
    known = None if start.data.sigma_max is None else start.data.sigma_max.upper
    bounds = ball_bounds(mlp, start.inputs, radius, input_norm=known if mlp.first.weight_trained else None)
    alpha = _alpha(mlp, bounds, n, start.data, start.sigma_min)
    smoothness = above(above(2 / n * bounds.jacobian_norm**2) + 2 * math.sqrt(value.upper) * bounds.curvature)
    step = below(2 * epsilon / smoothness) if math.isfinite(smoothness) else 0.0
    flow, descent = (_judge(value, alpha, radius, eps) for eps in (0.0, epsilon))
    return DescentCertificate(radius, value, alpha, smoothness, epsilon, step, descent, flow)


def _judge(value: Bounded, alpha: Bounded, radius: float, epsilon: float) -> Criterion:
    """Judge the criterion by a lower bound of alpha, which can prove it and cannot refute it."""
    score = below(below(criterion_score(value.upper, alpha.lower, radius, epsilon=epsilon)))
    asks = f"{'(1 - eps)^2 ' if epsilon else ''}r^2 alpha(x_0, r) / (4 f(x_0)) > 1 for some r"
    verdict: Verdict = "certified" if score > 1 else "undecided"
    reason = f"at r = {radius:.4g} the score is at least {score:.4g}"
    if verdict == "undecided":
        reason += f", which decides nothing: the proven alpha is a lower bound{alpha.reason and f'; {alpha.reason}'}"
    name = "criterion_score_descent" if epsilon else "criterion_score"
    return Criterion(name, SOURCE, asks, score, 1.0, verdict, reason)


def _loss(mlp: SmoothMLP, inputs: Tensor, targets: Tensor) -> Bounded:
    """Compute f at the centre with a bound of the rounding of the forward pass."""
    residual, error = residual_with_error(mlp, inputs, targets)
    value = float(residual.square().mean())
    upper = above(float((residual + error).square().mean()))
    lower = below(float((residual - error).clamp(min=0).square().mean()))
    return Bounded(value, lower, upper, True, "running error of the forward")
