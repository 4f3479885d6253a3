"""What the argument of the two-phase rule does not cover in a run, in words."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.steps import decays
from lightning_conv.networks.head import Head

# Precisions of the trainer in which gradients are rounded, with the type that they are rounded to.
ROUNDED = {
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}


def optimizer_caveats(trainer: pl.Trainer, head: Head) -> list[str]:
    """Return what the run's own optimizer minimises beside the loss, where it moves the head.

    Args:
        trainer: Trainer of the run.
        head: Head of the network.
    """
    decayed = decays(trainer.optimizers[0], head.module.parameters())
    return ["weight decay on the head adds to the loss that is minimised"] if decayed else []


def find_caveats(view: GuardView, own_steps: bool = False) -> list[str]:
    """Return every reason why the run minimises something else than the mean loss over the certified samples, or may not be convex.

    Args:
        view: The run.
        own_steps: Whether the guard moves the head in phase 2, and not the run's optimizer.
    """
    found = view.data.caveats()
    if not view.head.last:
        found.append("what follows the head is taken on trust to be convex with the loss")
    if not own_steps:
        found += optimizer_caveats(view.trainer, view.head)
    precision = str(view.trainer.precision)
    if (kind := ROUNDED.get(precision)) is not None:
        name = str(kind).removeprefix("torch.")
        found.append(
            f"the run computes in {name} (precision {precision!r}): its steps see features and outputs that are rounded to "
            f"{torch.finfo(kind).eps:.0e} of their size, while the certificate is about the float64 features of the same weights"
        )
    return found
