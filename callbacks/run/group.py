"""``CallbackGroup``: several callbacks in one entry of a trainer's list."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_conv.callbacks.run.callbacks import stored_state

OF_A_BATCH = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


class CallbackGroup(pl.Callback):
    """Base of a callback that holds others and calls their hooks; the trainer's list has one entry for all of them.

    Lightning calls seven hooks of every entry in every step, whether they do anything or not: 13 microseconds on one core of a server
    (Xeon, 2026), which counts where a step takes a millisecond. The hooks below are those that the callbacks of this library have. A
    member may say with ``rests_until`` and ``notes_steps``, as ``KernelMonitor`` does, when those of a batch have nothing to do. What it
    has to see of every batch all the same, ``note_batch(trainer, outputs, batch)`` gets while the group rests.

    A checkpoint has the states of the members in that of the group. States of the same callbacks in a list, and those of a group for
    callbacks in a list, are found as well.

    Attributes:
        members: The callbacks that take part in the run; ``setup`` may choose them.
    """

    def __init__(self, members: Sequence[pl.Callback]) -> None:
        self.members = list(members)
        self._rest_until = 0.0  # a moment before which no batch has anything to do
        self._noting = self.members  # those that have something to do before an optimizer step
        self._notes: list[
            Callable[[pl.Trainer, Any, Any], None]
        ] = []  # what is done in batches in which the others rest

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for member in self.members:
            member.setup(trainer, pl_module, stage)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for member in self.members:
            member.teardown(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rest_until, self._noting = 0.0, self.members
        self._notes = [each.note_batch for each in self.members if hasattr(each, "note_batch")]
        for member in self.members:
            member.on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() < self._rest_until:
            return
        for member in self.members:
            member.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for member in self._noting:
            member.on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() < self._rest_until:
            for note in self._notes:
                note(trainer, outputs, batch)
            return
        for member in self.members:
            member.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        asked = [each for each in self.members if any(_overrides(each, hook) for hook in OF_A_BATCH)]
        self._rest_until = min((getattr(each, "rests_until", 0.0) for each in asked), default=math.inf)
        self._noting = [each for each in asked if getattr(each, "notes_steps", True)]

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for member in self.members:
            member.on_validation_end(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for member in self.members:
            member.on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for member in self.members:
            member.on_train_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for member in self.members:
            member.on_fit_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for member in self.members:
            member.on_exception(trainer, pl_module, exception)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {each.state_key: state for each in self.members if (state := each.state_dict())}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for member in self.members:
            if (state := state_dict.get(member.state_key)) is not None:
                member.load_state_dict(state)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning calls ``load_state_dict`` next, if there is a state of the group.
        own = checkpoint.get("callbacks", {}).get(self.state_key, {})
        for member in self.members:
            if member.state_key not in own and (state := stored_state(checkpoint, member.state_key)) is not None:
                member.load_state_dict(state)


def _overrides(callback: pl.Callback, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(pl.Callback, hook)


def entry_of(trainer: pl.Trainer, callback: pl.Callback) -> pl.Callback:
    """Return the entry of the trainer's list through which a callback takes part: itself, or the group that it is a member of.

    Args:
        trainer: Trainer of the run.
        callback: The callback.
    """
    entries = trainer.callbacks  # type: ignore[attr-defined]
    groups = [each for each in entries if isinstance(each, CallbackGroup)]
    return next((each for each in groups if any(member is callback for member in each.members)), callback)
