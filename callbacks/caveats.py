"""What the argument of the two-phase rule does not cover in a run, in words."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_conv.anatomy import Head
from lightning_conv.callbacks.training_set import TrainingSet


def find_caveats(trainer: pl.Trainer, data: TrainingSet, head: Head) -> list[str]:
    """Every reason why the run minimises something else than the mean loss over the certified samples, or may not be convex."""
    found = data.caveats()
    if not head.last:
        found.append("what follows the head is taken on trust to be convex with the loss")
    own = {id(parameter) for parameter in head.module.parameters()}
    for group in trainer.optimizers[0].param_groups:
        if group.get("weight_decay") and any(id(parameter) in own for parameter in group["params"]):
            found.append("weight decay on the head adds to the loss that is minimised")
    return found
