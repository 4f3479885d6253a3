"""``SeriesKeeper``: a callback that keeps what a run logs, by step, for a page that is written when the fit ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_conv.callbacks.run.callbacks import load_from_group
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.reporting.series import Series
from lightning_conv.reporting.tags import GROUPS

IDLE_EPOCHS = 8
"""Of so many epochs one is looked at while the module has logged nothing: reading takes 0.1 ms, as long as a small step."""

MOST_SERIES = 300
"""Quantities that are kept; of the user's own the first ones."""


class SeriesKeeper(pl.Callback):
    """Keeps the scalars of this library's callbacks and those that the module logs, on rank zero, also in checkpoints.

    What the library logs comes from ``log_metrics``. What the module logs is read from ``trainer.callback_metrics`` when an epoch of
    training or a validation ends, as ``ModelCheckpoint`` does.

    Attributes:
        series: The quantities by tag.
        shares: Each layer's share of the kernel's trace at the last measurement, by the name of the optimizer, empty where there is one.
    """

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.shares: dict[str, dict[str, float]] = {}
        self._seen: dict[str, Any] = {}  # values of the module that were kept: one that is there still is not new
        self._begins = True

    def keep(self, trainer: pl.Trainer, metrics: Mapping[str, float], step: int) -> None:
        """Keep values; one that is not finite is a gap.

        Args:
            trainer: Trainer of the run.
            metrics: Values by tag.
            step: Their step.
        """
        if not trainer.is_global_zero:
            return
        self._begin(trainer.global_step)
        for name, value in metrics.items():
            if name not in self.series and (len(self.series) >= MOST_SERIES or not math.isfinite(value)):
                continue
            self.series.setdefault(name, Series()).put(step, float(value))

    def keep_shares(self, optimizer: str, shares: Mapping[str, float]) -> None:
        """Keep each layer's share of the trace.

        Args:
            optimizer: Name of the optimizer; empty in a run with one.
            shares: The shares by layer.
        """
        self.shares[optimizer] = dict(shares)

    def _begin(self, step: int) -> None:
        """Forget what lies behind the step at which this fit begins: it is of a run before."""
        if not self._begins:
            return
        self._begins = False
        if step == 0:
            self.series, self.shares, self._seen = {}, {}, {}
        for series in self.series.values():
            series.cut(step + 1)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begins = True

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._keep_of_module(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A module that has logged nothing so far is asked again in some epochs only, the same ones on all ranks.
        if self._seen or trainer.current_epoch < IDLE_EPOCHS or trainer.current_epoch % IDLE_EPOCHS == 0:
            self._keep_of_module(trainer)

    def _keep_of_module(self, trainer: pl.Trainer) -> None:
        """Keep what the module has logged since the last time."""
        # On every rank: a metric that is reduced over the processes is computed here, and all of them take part. What a metric of the
        # module fails by, the trainer will meet next.
        with attempted(Exception):
            found = dict(trainer.callback_metrics)
            own = {name: value for name, value in found.items() if not name.startswith(GROUPS)}
            new = {name: each for name, each in own.items() if self._seen.get(name) is not each and each.numel() == 1}
            self._seen = own
            if new:
                self.keep(trainer, {name: float(value) for name, value in new.items()}, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self.series:
            return {}
        return {"series": {name: each.state_dict() for name, each in self.series.items()}, "shares": self.shares}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.series = {name: Series.from_state(each) for name, each in state_dict.get("series", {}).items()}
        self.shares = {name: dict(each) for name, each in state_dict.get("shares", {}).items()}
        self._seen, self._begins = {}, True

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        load_from_group(self, checkpoint)
