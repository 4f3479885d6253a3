"""Gradients compared with one another, and that of the head with what its outputs make of it."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.call import Seen
from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.callbacks.run.steps import clips_values
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.linalg.rounding import gamma, unit_roundoff
from lightning_conv.losses.of_outputs import ULPS, OutputLoss, Point, evaluate
from lightning_conv.networks.head_probe import same
from lightning_conv.networks.precision import product_roundoff
from lightning_conv.networks.watched import as_rows


def product_rounding(rows: int, dtype: torch.dtype) -> float:
    r"""Return 4 :math:`\gamma_{n + 2}`, by which two ways to sum n products may differ, relative to the sum of their absolute values.

    Products that underflow add at most n times the smallest normal number.

    Args:
        rows: n.
        dtype: Type in which they are summed.
    """
    return 4 * gamma(rows + 2, dtype)


def beside_the_outputs(view: GuardView, twin: Twin, made: Seen) -> str:
    """Return whether the gradient of a step by the head's weight is another one than sum_i s_i h_i^T, s the gradient by the outputs.

    Args:
        view: The run.
        twin: Copy on which the step was run.
        made: The step.
    """
    weight = twin.module.get_parameter(f"{view.head_name}.weight")
    slope, gradient = torch.autograd.grad(made.loss, [made.outputs, weight], allow_unused=True, retain_graph=True)
    if slope is None:
        return "the head's outputs could not be followed to the loss: it does not depend on them, or they are in compiled code"
    if gradient is None:
        return "the loss of the training step has no gradient by the head's weight"
    s, h = as_rows(slope).double(), made.features.double()
    expected, sizes = s.T @ h, s.abs().T @ h.abs()
    coarsest = max((gradient.dtype, slope.dtype), key=lambda kind: torch.finfo(kind).eps)
    unit = max(unit_roundoff(coarsest), product_roundoff(gradient)) / unit_roundoff(coarsest)
    allowed = unit * product_rounding(len(h), coarsest) * sizes + len(h) * torch.finfo(coarsest).tiny
    if bool(((gradient.double() - expected).abs() <= allowed).all()) or not bool(torch.isfinite(expected).all()):
        return ""
    return "the gradient of the training step by the head is not that of a loss of the head's outputs"


def factor_of(actual: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """Return the positive number c for which c times ``made`` is closest to ``actual``: a callback may scale the whole gradient.

    Args:
        actual: Gradients.
        made: What they are compared with.
    """
    squares = sum(float(each.double().square().sum()) for each in made)
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(actual, made, strict=True))
    return product / squares if squares > 0 and product > 0 else 1.0


def is_multiple(some: Tensor, others: Tensor, unit: float) -> bool:
    """Return whether gradients of a loss by its outputs are one number times others, up to 256 units of rounding.

    Args:
        some: Gradients.
        others: What they are compared with.
        unit: Relative rounding of the coarsest type in use.
    """
    here, there = some.double(), others.double()
    squares = float(there.square().sum())
    factor = float((here * there).sum()) / squares if squares > 0 else 0.0
    sizes = here.abs() + abs(factor) * there.abs()
    allowed = 4 * ULPS * unit * (sizes + sizes.mean()) + torch.finfo(some.dtype).tiny
    return bool(((here - factor * there).abs() <= allowed).all())


def depends_on_the_batch(whole: Point, rows: Tensor, half: OutputLoss) -> str:
    """Return whether the gradient by some samples' outputs is another one in a batch of these alone, by more than one factor.

    Args:
        whole: The loss of a batch.
        rows: Rows of these samples' outputs.
        half: The loss of a batch of these samples.

    Cost: one evaluation.
    """
    alone = evaluate(half, whole.outputs[rows])
    if not alone.finite or is_multiple(whole.slope[rows], alone.slope, max(whole.unit, alone.unit)):
        return ""
    return "the loss of a sample depends on what else is in its batch, or on its place there, not through the outputs"


def made_by_outputs(gradients: Sequence[Tensor], calls: Sequence[tuple[Tensor, Tensor]], ranks: Ranks) -> bool:
    r"""Return whether the head's gradients are :math:`c \sum_i s_i h_i^\top` and :math:`c \sum_i s_i`, up to rounding, for some c > 0.

    Args:
        gradients: By the head's weight, or by weight and bias. All ranks call it together, with averaged ones.
        calls: h, which entered the head, and s, the gradient by what it returned, of each call on this rank.
        ranks: The ranks.

    Cost: two products as large as that of the gradient, and under several ranks an average of two matrices of its size.
    """
    kinds = (each.dtype for each in (*gradients, *(s for _, s in calls)))
    coarsest = max(kinds, key=lambda kind: torch.finfo(kind).eps)
    rows, wide = sum(len(h) for h, _ in calls), torch.promote_types(coarsest, torch.float32)
    h, s = (torch.cat([call[k].to(wide) for call in calls]) for k in (0, 1))
    some = [s.T @ h, s.sum(0)][: len(gradients)], [s.abs().T @ h.abs(), s.abs().sum(0)][: len(gradients)]
    unit = max(unit_roundoff(coarsest), product_roundoff(gradients[0])) / unit_roundoff(coarsest)
    made, sizes = ([ranks.mean(each) for each in parts] for parts in some)
    allowed, underflow = unit * product_rounding(rows + ranks.world, coarsest), rows * torch.finfo(coarsest).tiny
    if not all(bool(torch.isfinite(each).all()) for each in made):
        return True
    factor = factor_of(gradients, made)
    return not any(
        bool(((actual - factor * each).abs() > factor * (allowed * size + underflow)).any())
        for actual, each, size in zip(gradients, made, sizes, strict=True)
    )


def same_or_clipped(trainer: pl.Trainer, judged: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Return whether gradients are those that were judged: bit for bit, or as clipping leaves them.

    Args:
        trainer: Trainer of the run, which says how it clips.
        judged: Gradients before.
        now: Gradients now.
    """
    if all(map(same, judged, now)):
        return True
    if (largest := trainer.gradient_clip_val) and clips_values(trainer):
        return all(torch.equal(was.clamp(-largest, largest), each) for was, each in zip(judged, now, strict=True))
    factor = factor_of(now, judged)
    return factor <= 1 and all(
        bool(((each - factor * was).abs() <= 8 * torch.finfo(was.dtype).eps * was.abs()).all())
        for was, each in zip(judged, now, strict=True)
    )


def norm_of(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of some tensors together, in float64.

    Args:
        tensors: The tensors.
    """
    return float(nn.utils.get_total_norm([each.detach().abs().double() for each in tensors]))


def distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of the differences of some tensors together.

    Args:
        some: Tensors.
        others: As many of the same shapes.
    """
    return norm_of([a - b for a, b in zip(some, others, strict=True)])
