"""What the guard says of a run that it cannot read, with the line to write, tried on a copy of the module before it is shown."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_conv.callbacks.run.data.training_set import TrainingSet
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.line_to_write import inputs_of, working_calls
from lightning_conv.callbacks.run.observe_run import copy_of
from lightning_conv.callbacks.run.step.samples_of_batch import describe, places_of_samples
from lightning_conv.networks.called_by import called_by
from lightning_conv.networks.head import find_head, scripted_part


def cannot_be_called(trainer: pl.Trainer, data: TrainingSet, unseen: str, error: Exception) -> str:
    """Return the message for a network that cannot be called: what was seen, and the line that says how it is called.

    Args:
        trainer: Trainer of the run.
        data: The training set.
        unseen: Why the training step could not be observed; empty: it was.
        error: Error of the call.
    """
    module, seen, line = type(trainer.lightning_module).__name__, "", ""
    with attempted(Exception), isolated():
        batch, _ = data.few(3)
        seen = f" on a batch of {describe(batch)}"
        line = _line(trainer, batch)
    observed = f"its training step could not be observed ({unseen}), and " if unseen else ""
    if not line and (scripted := scripted_part(trainer.lightning_module)):
        return (
            f"ExpressivityGuard: {module}: {observed}{scripted!r} is scripted, so its layers cannot be watched; script the trunk alone, "
            "and leave the last nn.Linear out of it"
        )
    line = line or "ExpressivityGuard(input_fn=lambda batch: ..., forward_fn=lambda module, x: ...)"
    said = str(error).partition("; pass ")[0] or "no message"
    return (
        f"ExpressivityGuard: {module}: {observed}the network could not be called{seen} ({type(error).__name__}: {said}); "
        f"say how it is called, in this way: {line}"
    )


def _line(trainer: pl.Trainer, batch: object) -> str:
    """Return the line with the first call of the module that ends in a linear layer; empty: none was found."""
    module = copy_of(trainer, trainer.lightning_module).module
    for (taken, x), (written, call) in working_calls(module, list(inputs_of(batch, places_of_samples(batch)))):
        with attempted(Exception):
            find_head(called_by(module, call), x, tokens=True)
            return f"ExpressivityGuard(input_fn=lambda batch: {taken}, forward_fn=lambda module, x: {written})"
    return ""


def without_prefix(said: str, prefix: str) -> str:
    """Return a message with the names that layers have in the LightningModule.

    Args:
        said: Message about the network.
        prefix: What the names begin with there.
    """
    return said.replace(f'"{prefix}', '"').replace(f"'{prefix}", "'") if prefix else said


def several_heads(names: Sequence[str]) -> str:
    """Return the message for a loss of the outputs of several modules.

    Args:
        names: Dotted names of these modules.
    """
    made = " and ".join(f"self.{name}(...)" if name else "self(...)" for name in names)
    return (
        f"head: the loss depends on {made}, and phase 2 trains one layer; make one nn.Linear of them, and split what it returns: "
        "a, b = self.head(h).split([..., ...], 1)"
    )
