"""``named_logger``: a logger whose folder says what the run is: ``guarded_0``, ``plain_0``, in place of ``version_0``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_conv.callbacks import ExpressivityGuard

GUARDED, PLAIN = "guarded", "plain"


def kind_of_run(module: LightningModule, callbacks: list[Callback]) -> str:
    """Return ``guarded`` for a run with an ``ExpressivityGuard``, and ``plain`` for one without.

    Args:
        module: The module; a recipe has a setting ``guard``.
        callbacks: Those of the trainer.
    """
    guarded = bool(module.hparams.get("guard")) or any(isinstance(each, ExpressivityGuard) for each in callbacks)
    return GUARDED if guarded else PLAIN


def next_name(folder: Path, kind: str) -> str:
    """Return a kind of run with the first number that is greater than those of such runs in a folder.

    Args:
        folder: Of all runs of a recipe; it need not exist.
        kind: The kind.
    """
    found = [re.fullmatch(rf"{kind}_(\d+)", each.name) for each in folder.iterdir()] if folder.is_dir() else []
    return f"{kind}_{max((int(match[1]) for match in found if match), default=-1) + 1}"


def named_logger(logger: object, settings: Mapping[str, Any], kind: str) -> TensorBoardLogger | None:
    """Return a TensorBoard logger like a given one whose version is the name of the run; None: that one has a version, or is another one.

    Args:
        logger: The given one, which has written nothing so far.
        settings: The arguments of its constructor.
        kind: What kind of run it is.
    """
    if type(logger) is not TensorBoardLogger or settings.get("version") is not None:
        return None
    name = next_name(Path(logger.root_dir), kind)
    return TensorBoardLogger(**{**settings, "version": name})
