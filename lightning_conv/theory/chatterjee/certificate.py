"""Lower bounds of alpha with a proof, for networks with positive weights, and a step size that they certify."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.eigenvalues.bounded import Bounded
from lightning_conv.expressivity import RankCertificate, certify_expressivity
from lightning_conv.theory.ball_bounds import BallBounds, ball_bounds
from lightning_conv.theory.chatterjee.ratio import criterion_score, least_radius
from lightning_conv.theory.criterion import Criterion, Verdict
from lightning_conv.theory.smooth_mlp import SmoothMLP, above, below, outputs_with_error, read_mlp

SOURCE = "Chatterjee 2203.16462"
METHOD = "first layer's Gram matrix, positive weights"


@dataclass(frozen=True)
class DescentCertificate:
    """What is proven about gradient descent on f = (1/n) sum (u_i - y_i)^2 from the network's present weights.

    With ``holds``: descent with any constant step up to ``step`` stays within ``radius``, obeys f_k <= (1 - delta)^k
    f_0 with delta = (1 - eps) alpha h, and converges to zero loss.
    """

    radius: float
    value: Bounded  # f(x_0)
    alpha: Bounded  # lower: proven on the ball
    smoothness: float  # proven upper bound of |Hess f|_2 where the path can be: in the ball, at losses up to f(x_0)
    epsilon: float
    step: float  # 2 eps / smoothness, rounded down
    criterion: Criterion
    flow: Criterion  # the same for gradient flow, eps = 0

    @property
    def holds(self) -> bool:
        """Whether the criterion for descent is proven."""
        return self.criterion.verdict == "certified"

    @property
    def score(self) -> float:
        """(1 - eps)^2 r^2 alpha / (4 f_0), proven; above 1 the certificate holds."""
        return self.criterion.measured

    @property
    def rate(self) -> float:
        """Share of the loss that a step of size ``step`` certainly takes away: (1 - eps) alpha h."""
        return below(below((1 - self.epsilon) * self.alpha.lower * self.step))

    @property
    def length(self) -> float:
        """No path is longer: 2 sqrt(f_0 / alpha) / (1 - eps)."""
        return above(least_radius(self.value.upper, self.alpha.lower, epsilon=self.epsilon))


def affine_independence(inputs: Tensor, *, bias: bool = True) -> RankCertificate:
    """Whether the n inputs are proven to be affinely (without ``bias``: linearly) independent: rank [X, 1] = n, which needs n <= d + 1.

    It is the expressivity condition of the input layer; ``sigma_min.lower`` squared bounds lambda_min([X, 1][X, 1]^T)
    from below.

    Args:
        inputs: (n, ...), flattened to (n, d), taken as the numbers they are.
        bias: whether the first layer's bias is trained.

    Cost: a singular value decomposition of n x (d + 1).

    Example:
        >>> affine_independence(torch.eye(4, 3)).verdict, affine_independence(torch.eye(4, 3), bias=False).verdict
        ('certified', 'refuted')
    """
    return certify_expressivity(inputs.detach().cpu().double().flatten(1), method="singular", bias=bias)


def certify_alpha(
    model: nn.Module | SmoothMLP, inputs: Tensor, radius: float, *, data: RankCertificate | None = None
) -> Bounded:
    r"""A proven lower bound of alpha(x_0, r) for f = (1/n) sum (u_i - y_i)^2 and an MLP with non-negative weights from layer 3 on.

    With X~ = [X, 1] (X alone without a trained first bias), e = u - y and c_ij = du_i / dz_1j:

    .. math:: \frac{\partial f}{\partial \tilde W_{1,j}} = \frac2n \sum_i e_i c_{ij} \tilde x_i, \qquad
        |\nabla f|^2 \ge \frac{4}{n^2} \sum_j (c_j \circ e)^T \tilde X \tilde X^T (c_j \circ e)
        \ge \frac4n \lambda_{\min}(\tilde X \tilde X^T) \min_i \sum_j c_{ij}^2 \; f .

    ``ball_bounds`` gives the last factor everywhere in the ball, whatever the targets are. For L = k f multiply by k.
    [derived]

    Args:
        model: see ``read_mlp``; the centre of the ball. Its first layer must be trained.
        inputs: (n, d).
        radius: r.
        data: ``affine_independence`` of the inputs, if it is there already.

    Returns:
        An interval from the proven bound to infinity; ``reason`` says why the bound is 0.

    Raises:
        ValueError: a network of another kind, or inputs that do not fit it.
    """
    mlp = model if isinstance(model, SmoothMLP) else read_mlp(model)
    _require_trained(mlp)
    data = data or affine_independence(inputs, bias=mlp.first.bias_trained)
    return _alpha(ball_bounds(mlp, inputs, radius), len(inputs), data)


def certify_descent(
    model: nn.Module | SmoothMLP,
    inputs: Tensor,
    targets: Tensor,
    *,
    radius: float | None = None,
    epsilon: float = 0.5,
    data: RankCertificate | None = None,
) -> DescentCertificate:
    r"""Prove, before the first step, that gradient descent on f = (1/n) sum (u_i - y_i)^2 reaches zero loss, and with which step.

    Let 4 f_0 < (1 - eps)^2 r^2 alpha with alpha as in ``certify_alpha``, and let |Hess f| <= M at all points of B(x_0,
    r) with f <= f_0. Then descent with h <= 2 eps / M obeys f_{k+1} <= f_k - (1 - eps) h |grad f_k|^2, stays in the
    ball and converges at the rate (1 - eps) alpha h. Proof: walk along a step, x(t) = x_k - t grad f_k. As long as x(t)
    is in the ball with f <= f_0, Taylor gives f(x(t)) <= f_k - t (1 - t M / 2) |grad f_k|^2 <= f_k - (1 - eps) t |grad
    f_k|^2, so f falls, and ``length_bound`` keeps the path so far strictly shorter than 2 sqrt(f_0 / alpha) / (1 - eps)
    < r. Hence the walk cannot leave that set before t = h. [derived; the paper bounds the Hessian on B(x_0, 2r)
    instead, and the step by r / sup |grad f| too]

    M comes from the residual: |e| <= sqrt(n f_0) there, so with ``ball_bounds``

    .. math:: |\nabla^2 f| = \frac2n \Bigl| J^T J + \sum_i e_i \nabla^2 u_i \Bigr| \le \frac2n |J|^2 + 2 \sqrt{f_0} \,
    \max_i |\nabla^2 u_i| .

    Args:
        model: as in ``certify_alpha``.
        inputs: (n, d).
        targets: y, n numbers.
        radius: r; None: the one with the fastest certified rate, or if there is none with the largest score.
        epsilon: between 0 and 1: half is the best for the rate, less is easier to certify.
        data: as in ``certify_alpha``.

    Raises:
        ValueError: as in ``certify_alpha``; other numbers of targets, or ``epsilon`` outside (0, 1).

    Cost: a forward, the singular values of the inputs, and small eigenvalue problems for about a hundred radii.
    """
    mlp = model if isinstance(model, SmoothMLP) else read_mlp(model)
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: {epsilon}; need a number between 0 and 1")
    if targets.numel() != len(inputs):
        raise ValueError(f"targets: {targets.numel()} for {len(inputs)} samples; need one number a sample")
    _require_trained(mlp)
    data = data or affine_independence(inputs, bias=mlp.first.bias_trained)
    value = _loss(mlp, inputs, targets)
    if radius is not None:
        return _certificate(mlp, inputs, value, radius, epsilon, data)
    scale = max(float(layer.weight.norm()) for layer in mlp.layers) or 1.0
    grid = torch.logspace(math.log10(scale) - 6, math.log10(scale) + 0.5, 66, dtype=torch.float64).tolist()
    best = _best([_certificate(mlp, inputs, value, r, epsilon, data) for r in grid])
    fine = torch.logspace(-0.1, 0.1, 21, dtype=torch.float64).tolist()
    return _best([best, *(_certificate(mlp, inputs, value, best.radius * factor, epsilon, data) for factor in fine)])


def _require_trained(mlp: SmoothMLP) -> None:
    if not mlp.first.weight_trained:
        raise ValueError(
            "model: its first layer is frozen, and the bound of alpha comes from that layer's gradient; train it"
        )


def _best(found: list[DescentCertificate]) -> DescentCertificate:
    """The fastest of those that hold; if none does, the one with the largest score."""
    return max(found, key=lambda each: (each.holds, each.rate if each.holds else each.score))


def _alpha(bounds: BallBounds, samples: int, data: RankCertificate) -> Bounded:
    if data.verdict != "certified" or data.sigma_min is None:
        return Bounded(0.0, 0.0, math.inf, True, METHOD, f"the inputs are not proven independent: {data.reason}")
    smallest = below(data.sigma_min.lower**2)
    alpha = below(4 / samples * smallest * bounds.first_layer_gain**2)
    return Bounded(alpha, alpha, math.inf, True, METHOD, bounds.reason)


def _certificate(
    mlp: SmoothMLP, inputs: Tensor, value: Bounded, radius: float, epsilon: float, data: RankCertificate
) -> DescentCertificate:
    known = None if data.sigma_max is None else data.sigma_max.upper
    bounds = ball_bounds(mlp, inputs, radius, input_norm=known)
    alpha = _alpha(bounds, len(inputs), data)
    smoothness = above(above(2 / len(inputs) * bounds.jacobian_norm**2) + 2 * math.sqrt(value.upper) * bounds.curvature)
    step = below(2 * epsilon / smoothness) if math.isfinite(smoothness) else 0.0
    flow, descent = (_judge(value, alpha, radius, eps) for eps in (0.0, epsilon))
    return DescentCertificate(radius, value, alpha, smoothness, epsilon, step, descent, flow)


def _judge(value: Bounded, alpha: Bounded, radius: float, epsilon: float) -> Criterion:
    """The bound of alpha is one from below: it proves the criterion or leaves it open."""
    score = below(below(criterion_score(value.upper, alpha.lower, radius, epsilon=epsilon)))
    asks = f"{'(1 - eps)^2 ' if epsilon else ''}r^2 alpha(x_0, r) / (4 f(x_0)) > 1 for some r"
    verdict: Verdict = "certified" if score > 1 else "undecided"
    reason = f"at r = {radius:.4g} the score is at least {score:.4g}"
    if verdict == "undecided":
        reason += ", which leaves it open: the proven alpha is a lower bound" + (
            f"; {alpha.reason}" if alpha.reason else ""
        )
    name = "criterion_score_descent" if epsilon else "criterion_score"
    return Criterion(name, SOURCE, asks, score, 1.0, verdict, reason)


def _loss(mlp: SmoothMLP, inputs: Tensor, targets: Tensor) -> Bounded:
    """F at the centre, the rounding of the forward bounded."""
    outputs, error = outputs_with_error(mlp, inputs)
    residual = (outputs - targets.detach().cpu().double().flatten()).abs()
    value = float(residual.square().mean())
    upper = above(float((residual + error).square().mean()))
    lower = below(float((residual - error).clamp(min=0).square().mean()))
    return Bounded(value, lower, upper, True, "running error of the forward")
