"""A finding about the whole training set: the loss that equal inputs with unequal targets force on it."""

from __future__ import annotations

from dataclasses import replace

from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_fit import finding_of_floor
from lightning_conv.health.fit.loss_floor import LossFloor


def finding_of_training_floor(floor: LossFloor, *, what: str = "targets", step: int | None = None) -> Finding:
    """Judge the floor of the training set, as ``finding_of_floor`` does where the present loss on the same samples is not known.

    Args:
        floor: The floor; its conflicts are numbered as the samples of the training set.
        what: What differs: ``"labels"`` or ``"targets"``.
        step: Step of the measurement.

    Returns:
        ``notice``: there are conflicts. ``ok``: there are none.
    """
    found = finding_of_floor(floor, of="the training set", what=what, step=step)
    return replace(found, name="training_floor", page="")  # that of its own name
