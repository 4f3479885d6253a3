"""Frei et al. in a run: whether their theorem is about it, the rank of their network, and the margins of a classifier with one output."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor, nn

from lightning_conv.callbacks.criteria.networks import Found, find_network
from lightning_conv.networks.evaluation import Inputs
from lightning_conv.theory.networks import LeakyTwoLayer
from lightning_conv.theory.papers.frei import margins
from lightning_conv.theory.tools.matrix_norms import numerical_rank

SETTING = "two layers with a leaky ReLU between them and fixed output weights (LeakyTwoLayer)"


class ImplicitBias:
    """Follows one run."""

    def __init__(self) -> None:
        self.slope: float | str = "not looked at"
        """gamma of a ``LeakyTwoLayer`` that the run trains as Frei et al. do; otherwise the reason why they say nothing about the run."""
        self._place: str | None = None  # of a LeakyTwoLayer in the module

    def look(
        self, network: nn.Module, inputs: Inputs, targets: Tensor | None, trained: Collection[str], loss_fn: object
    ) -> None:
        """A run begins, or goes on.

        Args:
            network: whose kernel is measured.
            inputs: of the probe.
            targets: of the probe.
            trained: names of the parameters that the kernel is over.
            loss_fn: of the training step.
        """
        found = find_network(network, inputs, LeakyTwoLayer, trained, asks=SETTING)
        self._place = None if isinstance(found, str) else found.place
        self.slope = found if isinstance(found, str) else _slope_of(found, targets, loss_fn)

    def quantities(self, network: nn.Module) -> dict[str, float]:
        """How many singular values of the hidden weights exceed 1e-3 of the largest; of ``LeakyTwoLayer``, where two are left in the limit.

        Args:
            network: whose kernel is measured.

        Cost: all singular values of one matrix.
        """
        if self._place is None:
            return {}
        own = network.get_submodule(self._place)
        assert isinstance(own, LeakyTwoLayer)
        return {"numerical_rank": float(numerical_rank(own.weight.cpu()))}


def _slope_of(found: Found[LeakyTwoLayer], targets: Tensor | None, loss_fn: object) -> float | str:
    if found.trained != {"hidden.weight"}:
        return f"the theorem trains hidden.weight alone, and here it is {', '.join(sorted(found.trained)) or 'nothing'}"
    if not found.network.slope > 0:
        return "gamma = 0: Frei et al. say nothing about the ReLU"
    if not is_logistic(loss_fn):
        name = "not known" if loss_fn is None else type(loss_fn).__name__
        return (
            f"the theorem is about the logistic loss (nn.SoftMarginLoss, nn.BCEWithLogitsLoss), and the run's is {name}"
        )
    if targets is None or signs(targets, loss_fn) is None:
        return "the theorem is about two classes, and the targets are not those of two"
    return found.network.slope


def is_logistic(loss_fn: object) -> bool:
    """Whether the loss is log(1 + exp(-y f)), every sample with the same weight."""
    if isinstance(loss_fn, nn.BCEWithLogitsLoss):
        return loss_fn.weight is None and loss_fn.pos_weight is None
    return isinstance(loss_fn, nn.SoftMarginLoss)


def signs(targets: Tensor, loss_fn: object) -> Tensor | None:
    """The targets as y_i = -1 and 1, where both are among them; None: they are not two classes that one output's sign tells apart.

    One number a sample: dense targets are not looked through.

    ``nn.BCEWithLogitsLoss`` has the classes 0 and 1 and compares its outputs with 0. Every other loss is read with -1 and 1: to a squared
    loss 0 and 1 are values, and its outputs would be compared with 1/2.

    Args:
        targets: of the probe.
        loss_fn: of the training step.
    """
    if targets.ndim == 0 or targets.numel() != len(targets):
        return None
    y = targets.detach().cpu().double().flatten()
    if isinstance(loss_fn, nn.BCEWithLogitsLoss):
        y = 2 * y - 1
    positive, negative = y == 1, y == -1
    two_classes = (positive | negative).all() and positive.any() and negative.any()
    return y if bool(two_classes) else None


def margin_quantities(outputs: Tensor, targets: Tensor, loss_fn: object) -> dict[str, float]:
    """min_i y_i f(x_i), and that over the largest: ``margin_spread`` is 1 where all margins are equal, negative where a sample is wrong.

    Nothing for more than one output a sample, or targets that ``signs`` does not read. Where every margin is negative their
    quotient says nothing and is left out.

    Args:
        outputs: f, a row a sample.
        targets: of the probe.
        loss_fn: of the training step.
    """
    if outputs.numel() != len(outputs) or targets.numel() != len(outputs) or (y := signs(targets, loss_fn)) is None:
        return {}
    found = margins(outputs.cpu(), y)
    shown = {"margin_min": found.smallest}
    if found.largest > 0:
        shown["margin_spread"] = found.spread
    return {name: value for name, value in shown.items() if math.isfinite(value)}
