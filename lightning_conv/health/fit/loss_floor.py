"""``loss_floor``: what equal inputs with unequal targets leave of the training loss, whatever the network is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.arguments import require_type
from lightning_conv.losses.facts import binary_entropy
from lightning_conv.losses.per_sample import SampleLosses

HALVINGS = 60
"""Of the interval in which the minimum of an elementwise loss lies."""


@dataclass(frozen=True)
class LossFloor:
    """The least loss that any function of the inputs can have.

    Attributes:
        value: The floor, in the scale of the loss: a mean, or a sum.
        forced: What equal inputs with unequal targets add to it: the rest is the infimum of each sample by itself.
        conflicts: Groups of samples with equal inputs that cannot all have their own infimum, by number.
    """

    value: float
    forced: float
    conflicts: tuple[tuple[int, ...], ...]


def loss_floor(losses: SampleLosses, groups: Sequence[Sequence[int]]) -> LossFloor | None:
    r"""Compute the floor of the loss from groups of samples with equal inputs.

    .. math:: \inf_u L = \frac1n \sum_g \inf_u \sum_{i \in g} \ell_i(u)

    A function gives equal inputs equal outputs, so no network has a smaller loss. It holds for deterministic networks that see these
    samples as they are: not under augmentation, dropout, train-mode BatchNorm or a carried state.

    Args:
        losses: The losses of the samples, with their targets.
        groups: Groups of more than one sample with equal inputs, by number.

    Returns:
        The floor; None: the infimum of this loss is not known.

    Raises:
        TypeError: The losses are no ``SampleLosses``, or the groups no lists.
        ValueError: A group is empty, or has a number that no sample has.
    """
    require_type("losses", losses, SampleLosses, "SampleLosses(loss_fn, targets)")
    require_type("groups", groups, Sequence, "a list of lists of the numbers of samples")
    for group in groups:
        require_type("groups", group, Sequence, "a list of lists of the numbers of samples")
        if not group or not all(isinstance(each, int) and 0 <= each < losses.samples for each in group):
            raise ValueError(f"groups: {group!r}; need numbers of the {losses.samples} samples, from 0 on")
    infimum = losses.infimum
    if losses.kind == "custom" or infimum is None or not infimum.certified:
        return None
    added, conflicts = 0.0, []
    whole = losses.infima(slice(None))
    for group in groups:
        alone = float(whole[list(group)].sum())
        together = _infimum(losses, torch.tensor(list(group)))
        if together - alone > 1e-12 * (1 + abs(together)):
            added += together - alone
            conflicts.append(tuple(group))
    count = 1 if losses.loss.summed else losses.samples
    own = float(whole.sum())
    return LossFloor((own + added) / count, added / count, tuple(conflicts))


def _infimum(losses: SampleLosses, group: Tensor) -> float:
    """Return inf over u of the summed losses of a group."""
    if losses.kind == "cross-entropy":
        weight = losses.distributions(slice(None))[group].sum(0)
        total = weight.sum()
        return float(torch.special.xlogy(total, total) - torch.special.xlogy(weight, weight).sum())
    targets = losses.targets[group]
    if losses.kind == "squared":
        each = (targets - targets.mean(0)).square().sum(0)
    elif losses.kind == "binary":
        each = len(targets) * binary_entropy(targets.mean(0))
    else:
        each = _elementwise(losses, targets)
    return float(each.mean() if losses.mean else each.sum())


def _elementwise(losses: SampleLosses, targets: Tensor) -> Tensor:
    """Return a lower bound of the minimum of a convex loss of each output, by halving the interval between its targets."""
    low, high = targets.amin(0), targets.amax(0)

    def at(u: Tensor) -> tuple[Tensor, Tensor]:
        leaf = u.detach().requires_grad_()
        with torch.enable_grad():
            value = losses.module(leaf.expand_as(targets), targets).sum(0)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rises = at(middle)[1] > 0
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    value, slope = at(low)
    return (value - slope.abs() * (high - low)).clamp(min=0)
