"""What TensorBoard alone gets: its writers, the run ``limits`` beside a run, the tab HParams, and the link to the charts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.loggers.sending import logging_guard
from lightning_conv.callbacks.run.setting_texts import texts_of
from lightning_conv.reporting.charts import LIMITS
from lightning_conv.reporting.terminal import path_from_here

ADDRESS = "http://localhost:6006/#custom_scalars&_smoothingWeight=0"
"""The charts, not smoothed: TensorBoard's default smooths a few points into a line that is somewhere else."""

UNTICK = 'untick "Ignore outliers in chart scaling" there: it hides the first and last of few points'
"""The axes leave out what is beyond the percentiles 5 and 95 of a chart: of two points both. No link can change that."""


def boards_of(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    """Return the trainer's loggers that write for TensorBoard.

    Args:
        trainer: The trainer.
    """
    return [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]


def write(trainer: pl.Trainer, call: Callable[[Any], object]) -> None:
    """Call a function with the writer of every TensorBoard logger, which is a dummy on all ranks but the first.

    Args:
        trainer: Trainer of the run.
        call: The function.
    """
    for logger in boards_of(trainer):
        with logging_guard(logger):
            call(logger.experiment)


class LimitsWriter:
    """Writes what values are held against into the run ``limits`` of each TensorBoard logger, from the first such value on."""

    def __init__(self) -> None:
        self._writers: dict[str, Any] = {}

    def write(self, trainer: pl.Trainer, values: Mapping[str, float], step: int) -> None:
        """Write values of one step.

        Args:
            trainer: Trainer of the run.
            values: The values by tag.
            step: Their step.
        """
        if not trainer.is_global_zero or not values:
            return
        for logger in boards_of(trainer):
            with logging_guard(logger):
                writer = self._writer_of(logger)
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step)

    def _writer_of(self, logger: TensorBoardLogger) -> Any:
        folder = f"{logger.log_dir}/{LIMITS}"
        if folder not in self._writers:
            # Lightning's own import, which takes tensorboardX where there is no TensorBoard.
            self._writers[folder] = type(logger.experiment)(log_dir=folder)
        return self._writers[folder]

    def close(self) -> None:
        """Write what waits, and close the files."""
        for writer in self._writers.values():
            with attempted(Exception):
                writer.close()
        self._writers = {}


def say_where(trainer: pl.Trainer) -> None:
    """Say how to look at the charts of a run that has a TensorBoard logger.

    Args:
        trainer: Trainer of the run.
    """
    if trainer.fast_dev_run or not (loggers := boards_of(trainer)):  # type: ignore[attr-defined]
        return
    with logging_guard(loggers[0]):
        folder = path_from_here(loggers[0].root_dir)
        rank_zero_info(f"Charts: tensorboard --logdir {shlex.quote(folder)}, then {ADDRESS} ({UNTICK})")


def log_settings(
    trainer: pl.Trainer, constants: Mapping[str, float], metrics: Sequence[str], *, succeeded: bool
) -> None:
    """Log the settings of a run for the tab HParams, which compares runs, once at its end.

    They are those that the logger has of the module and of the data, and the constants of the run. TensorBoard takes the first ones that
    a run logs: where the module has logged settings with metrics, or the logger has ``default_hp_metric=True``, those stay.

    Args:
        trainer: Trainer of the run.
        constants: What was measured and has not changed, by tag.
        metrics: Tags whose last values are the columns beside the settings, in their order; the tab shows five at first.
        succeeded: Whether the fit came to its end.
    """
    if not trainer.is_global_zero:
        return
    for logger in boards_of(trainer):
        with logging_guard(logger), attempted(ImportError):
            _log_settings(logger, constants, metrics, succeeded=succeeded)


def _log_settings(
    logger: TensorBoardLogger, constants: Mapping[str, float], metrics: Sequence[str], *, succeeded: bool
) -> None:
    """Write the three records of the plugin.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    own = settings_of(dict(logger.hparams))
    records: Any = hparams({**own, **constants}, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
    plugin = [each.value[0].metadata.plugin_data for each in records]
    experiment, _, end = contents = [HParamsPluginData.FromString(each.content) for each in plugin]
    for info in experiment.experiment.hparam_infos:
        info.differs = info.name in own  # what may differ stands first, before the constants
    if not succeeded:
        end.session_end_info.status = Status.Value("STATUS_FAILURE")
    writer = logger.experiment._get_file_writer()
    for record, data, content in zip(records, plugin, contents, strict=True):
        data.content = content.SerializeToString()
        writer.add_summary(record)
    logger.experiment.flush()


def settings_of(values: Mapping[Any, Any], before: str = "") -> dict[str, float | str]:
    """Return settings as numbers and short texts; those of a dict by the name of that and their own, as in ``optimizer/lr``.

    Args:
        values: The settings by name.
        before: What stands before each name.
    """
    found: dict[str, float | str] = {}
    texts = texts_of(values)
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= settings_of(value, f"{before}{name}/")
        elif str(name) in texts:
            text = texts[str(name)]
            found[f"{before}{name}"] = value if isinstance(value, (int, float)) and text == str(value) else text
    return found
