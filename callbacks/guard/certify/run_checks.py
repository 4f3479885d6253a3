"""The checks of the guard's claim that the settings of a run decide."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lightning_conv.callbacks.guard.certify.checks import Check, of_reasons
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.steps import decays
from lightning_conv.callbacks.run.training_set import RANDOM_INPUTS
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


def checks_of(view: GuardView, own_steps: bool = False) -> list[Check]:
    """Return the checks that the settings of a run decide.

    Args:
        view: The run.
        own_steps: Whether the guard moves the head in phase 2, and not the run's optimizer.
    """
    probed = "" if view.head.probed else f"{view.head_name!r} was not probed at random weights"
    follows = "" if view.head.last else "what follows the head is taken on trust to be convex with the loss"
    found = {
        "head probed": [probed],
        "nothing follows the head": [follows],
        "every sample alike": list(view.data.sampling.caveats),
        "fixed inputs": [RANDOM_INPUTS] * view.data.is_random(),
        "no other term in the optimizer": [] if own_steps else optimizer_caveats(view.trainer, view.head),
        "full precision": [rounded(str(view.trainer.precision))],
        "steps of the rule": [],
        "given infimum": [],
    }
    return [check for name, reasons in found.items() for check in of_reasons(name, reasons)]  # type: ignore[arg-type]


def rounded(precision: str) -> str:
    """Return why a certificate in float64 is not about the steps of a run in this precision; empty if it is.

    Args:
        precision: Precision of the trainer.
    """
    if (kind := ROUNDED.get(precision)) is None:
        return ""
    name = str(kind).removeprefix("torch.")
    return (
        f"the run computes in {name} (precision {precision!r}): its steps see features and outputs that are rounded to "
        f"{torch.finfo(kind).eps:.0e} of their size, while the certificate is about the float64 features of the same weights"
    )
