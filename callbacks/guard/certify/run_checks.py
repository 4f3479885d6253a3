"""The checks of the guard's claim that the settings of a run decide."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_conv.callbacks.guard.certify.checks import Check, CheckName, of_reasons
from lightning_conv.callbacks.guard.certify.optimizer_copy import (
    DEPEND,
    SIZES,
    is_of_torch,
    moves_without_gradient,
    steps_depend_on_weights,
)
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.training_set import RANDOM_INPUTS
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.steps import decays
from lightning_conv.networks.head import Head
from lightning_conv.networks.narrow_types import is_floating

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
    optimizer = trainer.optimizers[0]
    said = ["weight decay on the head adds to the loss that is minimised"] * decays(optimizer, head.module.parameters())
    ascends = any(group.get("maximize") or group.get("lr", 0) < 0 for group in optimizer.param_groups)
    return [*said, *["the optimizer maximizes the loss"] * ascends]


def optimizer_check(view: GuardView) -> list[Check]:
    """Return the check that the run's own optimizer minimises nothing beside the loss, where it moves the head.

    A copy without its memory makes a step from gradients that are zero: a penalty of its own, or noise, moves the weights all the same.
    Where the class is not one of torch's, copies with its memory make some steps from other weights, too: without a further term they
    move alike. An optimizer of torch may fail in the first (LBFGS needs a closure); its weight decay is known.

    Args:
        view: The run.

    Cost: copies of the optimizer and of its parameters.
    """
    name: CheckName = "no other term in the optimizer"
    optimizer = view.trainer.optimizers[0]
    kind, known = type(optimizer).__name__, is_of_torch(optimizer)
    said = optimizer_caveats(view.trainer, view.head)
    if left := untrained(optimizer, view.head_parameters):
        said.append(f"the optimizer does not move the head's {left}, which the certificate counts as trained")
    with attempted(Exception) as attempt:
        if not said and moves_without_gradient(optimizer, view.head_parameters):
            said.append(f"{kind} moves weights whose gradient is zero, so it minimises something beside the loss")
        if not said and not known and steps_depend_on_weights(optimizer, view.head_parameters):
            said.append(f"the steps of {kind} {DEPEND}")
    if attempt.failed and not said and not known:
        return [Check(name, None, f"a step of a copy of {kind} could not be made: {attempt.reason}")]
    return of_reasons(name, said)


def other_term(view: GuardView, *, tried: bool) -> str:
    """Return what the run's own optimizer minimises beside the loss in the step that comes; empty if nothing was found.

    Args:
        view: The run.
        tried: Whether copies of an optimizer that is none of torch's make some steps.
    """
    optimizer = view.trainer.optimizers[0]
    if (terms := optimizer_caveats(view.trainer, view.head)) or not tried or is_of_torch(optimizer):
        return terms[0] if terms else ""
    kind = type(optimizer).__name__
    with attempted(Exception) as attempt:
        if steps_depend_on_weights(optimizer, view.head_parameters, sizes=SIZES[:1]):
            return f"the steps of {kind} {DEPEND}"
    return f"a step of a copy of {kind} could not be made: {attempt.reason}" if attempt.failed else ""


def untrained(optimizer: Optimizer, parameters: Sequence[Tensor]) -> str:
    """Return which parameter of the head an optimizer does not move: one that it does not have, or has with a learning rate of zero.

    Args:
        optimizer: Optimizer of the run. Where all rates of the head are zero, as at the end of a schedule, none is named.
        parameters: Weight and bias of the head, or the weight alone.
    """
    rates = [
        next((float(g.get("lr", 1.0)) for g in optimizer.param_groups if any(each is own for own in g["params"])), None)
        for each in parameters
    ]
    named = [
        name
        for name, rate in zip(("weight", "bias"), rates, strict=False)
        if rate is None or (rate == 0 and any(rates))
    ]
    return " and ".join(named)


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
        "full precision": [rounded(str(view.trainer.precision)), in_narrow_type(view.network)],
        "steps of the rule": [],
        "given infimum": [],
    }
    made = [check for name, reasons in found.items() for check in of_reasons(name, reasons)]  # type: ignore[arg-type]
    return [*made, *([Check("no other term in the optimizer", True)] if own_steps else optimizer_check(view))]


def in_narrow_type(network: nn.Module) -> str:
    """Return which parameter of a network has 16 bits or less; empty if none has.

    Args:
        network: The network.
    """
    named = network.named_parameters()
    narrow = next((f"{n!r} is in {t.dtype}" for n, t in named if is_floating(t) and t.dtype.itemsize < 4), "")
    return narrow and f"{narrow}, so its steps see features and outputs that are rounded to this type"


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
