"""The callbacks of one kind in a trainer."""

from typing import TypeVar

import lightning.pytorch as pl

Kind = TypeVar("Kind")


def callbacks_of(trainer: pl.Trainer, kind: type[Kind]) -> list[Kind]:
    """Return the trainer's callbacks of one class and its subclasses, in their order.

    Args:
        trainer: The trainer.
        kind: The class.
    """
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def find_callback(trainer: pl.Trainer, kind: type[Kind]) -> Kind | None:
    """Return the first callback of ``callbacks_of``, or None if there is none."""
    return next(iter(callbacks_of(trainer, kind)), None)
