"""The callbacks of a trainer: of one kind, those in groups included, and their states in a checkpoint."""

from collections.abc import Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

Kind = TypeVar("Kind")


def all_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the trainer's callbacks in their order, each followed by its ``members`` (``CallbackGroup``).

    Args:
        trainer: The trainer.
    """
    listed: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for callback in listed for each in (callback, *getattr(callback, "members", ()))]


def callbacks_of(trainer: pl.Trainer, kind: type[Kind]) -> list[Kind]:
    """Return the trainer's callbacks of one class and its subclasses, in their order.

    Args:
        trainer: The trainer.
        kind: The class.
    """
    return [callback for callback in all_callbacks(trainer) if isinstance(callback, kind)]


def find_callback(trainer: pl.Trainer, kind: type[Kind]) -> Kind | None:
    """Return the first callback of ``callbacks_of``, or None if there is none."""
    return next(iter(callbacks_of(trainer, kind)), None)


def averaged_before(trainer: pl.Trainer, callback: pl.Callback) -> str:
    """Return which callback of Lightning puts averaged weights in place of the last ones before another looks; empty: none does.

    Args:
        trainer: The trainer; its callbacks end the fit in the order of its list.
        callback: The one that looks, in ``on_train_end``.
    """
    for each in all_callbacks(trainer):
        if each is callback:
            break
        if isinstance(each, (StochasticWeightAveraging, WeightAveraging)):
            return type(each).__name__
    return ""


def stored_state(checkpoint: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """Return the state of a callback in a checkpoint, by itself or in that of a group; None: it has none.

    Args:
        checkpoint: The checkpoint.
        key: ``state_key`` of the callback.
    """
    states = checkpoint.get("callbacks") or {}
    groups = [each for each in states.values() if isinstance(each, Mapping)]
    found = [each[key] for each in (states, *groups) if isinstance(each.get(key), Mapping)]
    return dict(found[0]) if found else None


def load_from_group(callback: pl.Callback, checkpoint: Mapping[str, Any]) -> None:
    """Give a callback its state in a checkpoint in which it was a member of a group; one that was there by itself has it from the trainer.

    Args:
        callback: The callback.
        checkpoint: The checkpoint.
    """
    by_itself = callback.state_key in checkpoint.get("callbacks", {})
    if not by_itself and (state := stored_state(checkpoint, callback.state_key)) is not None:
        callback.load_state_dict(state)
