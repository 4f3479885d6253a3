"""Prescribed outputs: outputs close to given ones at which every sample's loss is small enough."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.losses.per_sample import SampleLosses

BISECTIONS = 40


def prescribed_outputs(losses: SampleLosses, outputs: Tensor, excess: float, rows: slice | None = None) -> Tensor:
    r"""Compute outputs v near u, (n, C), with :math:`\ell_i(v_i) - \inf \ell_i \le` ``excess`` for every sample.

    A sample whose loss is small enough keeps its outputs. Every other sample moves from u_i on a straight line towards a
    goal of half the excess, as far as needed. The distance is found by bisection: the loss is convex, so the points that are
    good enough form an interval at the end of the line. The goals are:

    - squared, Huber, ...: y_i.
    - cross-entropy with distribution q: log q + a for the outputs with q > 0, while the others stay. The number a is the one
      closest to u that makes the share of the others small enough. For class numbers only the output of the class rises.
    - binary: logit(t); for t = 0 and 1 the first output that is good enough.

    Args:
        losses: losses of the samples; torch's, not the caller's own.
        outputs: u, (m, C), float64.
        excess: the allowed excess, above 0.
        rows: the samples; None: all.

    Raises:
        ValueError: the loss is the caller's own, whose minimisers are not known, or the excess is not positive.

    Cost: 40 evaluations of the losses, no pass over the features.
    """
    rows = slice(0, losses.samples) if rows is None else rows
    if losses.kind == "custom":
        raise ValueError("loss_fn: the outputs of small loss are not known for the caller's own loss")
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
