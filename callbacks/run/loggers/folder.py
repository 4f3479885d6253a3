"""``run_folder``: the folder of a run for its own files, another one for each run of a project."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from lightning_conv.callbacks.run.guarded import attempted


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of a run, which no other run of its loggers shares.

    It is ``log_dir`` of the first logger that has one (TensorBoard, CSV). Else it is ``save_dir/name/version`` of the first logger, in
    which Lightning keeps the checkpoints: of Weights & Biases, MLflow, Comet and Aim these are the folder for all runs, the project or
    experiment, and the id of the run. A logger without a local folder has it below the trainer's ``default_root_dir``, and a run without
    a logger has ``default_root_dir`` itself.

    Only the loggers of rank zero know the id of the run, and only once it has begun, which is before ``setup``. There is no collective
    in it.

    Args:
        trainer: Trainer of the run.
    """
    root = Path(trainer.default_root_dir)
    for logger in trainer.loggers:
        if folder := log_dir_of(logger):
            return folder
    for logger in trainer.loggers:
        with attempted(Exception):  # a server that does not answer has no name for its run
            return _root_of(logger, root) / _parts(logger.name) / _parts(_version(logger))
    return root


def log_dir_of(logger: Logger) -> Path | None:
    """Return the local folder in which a logger writes this run and no other; None: it has none.

    Args:
        logger: A logger of the trainer.
    """
    with attempted(Exception):
        found = getattr(logger, "log_dir", None)
        if isinstance(found, (str, os.PathLike)) and _is_local(found):
            return Path(found)
    return None


def _root_of(logger: Logger, root: Path) -> Path:
    """Return the folder of all runs of a logger."""
    return Path(logger.save_dir) if logger.save_dir and _is_local(logger.save_dir) else root


def _version(logger: Logger) -> str | None:
    return f"version_{logger.version}" if isinstance(logger.version, int) else logger.version


def _parts(name: object) -> Path:
    """Return a name as a path that leads down and not up."""
    return Path(*(part for part in Path("" if name is None else str(name)).parts if part not in ("/", "..")))


def _is_local(folder: str | os.PathLike[str]) -> bool:
    return "://" not in os.fspath(folder)
