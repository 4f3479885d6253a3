"""Outputs close to given ones at which every sample's loss is as small as asked: what a head of full rank can be told to say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.losses.per_sample import SampleLosses

BISECTIONS = 40


def prescribed_outputs(losses: SampleLosses, outputs: Tensor, excess: float, rows: slice | None = None) -> Tensor:
    r"""Outputs v, (n, C), with :math:`\ell_i(v_i) - \inf \ell_i \le` ``excess`` for every sample, near u and on a straight line from it.

    A sample that is that good stays where it is. The others move from u_i towards a point that is twice as good and go
    as far as needed (bisection; the loss is convex, so what is good enough is an interval at the end of the line):

    - squared, Huber, ...: towards y_i
    - cross-entropy with distribution q: the outputs where q > 0 towards log q + a, the others stay; a is the nearest to
      u that makes the others' share small enough. For class numbers only the output of the class rises.
    - binary: towards logit(t), for t = 0 and 1 to the first output that is good enough

    Args:
        losses: of the samples; torch's, not the caller's own.
        outputs: u, (m, C), float64.
        excess: above 0.
        rows: the samples; None: all.

    Raises:
        ValueError: the caller's own loss, whose minimisers are not known, or an excess that is not positive.

    Cost: 40 evaluations of the losses, no pass over the features.
    """
    rows = slice(0, losses.samples) if rows is None else rows
    if losses.kind == "custom":
        raise ValueError("loss_fn: outputs of small loss are not known for the caller's own loss")
    if not excess > 0:
        raise ValueError(f"excess: {excess}; need a positive number")
    goal = _goal(losses, outputs, excess / 2, rows)
    infima = losses.infima(rows)
    low = torch.zeros(len(outputs), dtype=torch.float64, device=outputs.device)
    high = torch.ones_like(low)
    high[losses.each(outputs, rows) - infima <= excess] = 0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        good = losses.each(torch.lerp(outputs, goal, middle[:, None]), rows) - infima <= excess
        high, low = torch.where(good, middle, high), torch.where(good, low, middle)
    return torch.lerp(outputs, goal, high[:, None])


def _goal(losses: SampleLosses, outputs: Tensor, excess: float, rows: slice) -> Tensor:
    if losses.kind == "cross-entropy":
        return _cross_entropy_goal(losses, outputs, excess, rows)
    targets = losses.targets[rows]
    if losses.kind == "binary":
        margin = -math.log(math.expm1(excess if losses.mean else excess / losses.outputs))
        goal = torch.logit(targets)
        goal = torch.where(targets == 1, outputs.clamp(min=margin), goal)
        return torch.where(targets == 0, outputs.clamp(max=-margin), goal)
    return targets


def _cross_entropy_goal(losses: SampleLosses, outputs: Tensor, excess: float, rows: slice) -> Tensor:
    q = losses.distributions(rows)
    total = q.sum(1, keepdim=True)
    inside = q > 0
    logarithms = torch.where(inside, (q / total).log(), torch.zeros_like(q))
    # ell - inf ell = |q| log(1 + sum_outside e^u / e^a) at log(q / |q|) + a.
    outside = torch.where(inside, torch.full_like(outputs, -math.inf), outputs).logsumexp(1, keepdim=True)
    enough = outside - torch.expm1(excess / total).log()
    nearest = torch.where(inside, outputs - logarithms, torch.zeros_like(q)).sum(1, keepdim=True) / inside.sum(
        1, keepdim=True
    )
    return torch.where(inside, logarithms + torch.maximum(nearest, enough), outputs)
