"""``read_run``: what the folder of a run has of it: ``convergence.json``, TensorBoard's event files, ``metrics.csv``, ``hparams.yaml``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lightning_conv.recipes.usage import UsageError
from lightning_conv.reporting.charts import LIMITS
from lightning_conv.reporting.page.run_record import RunRecord
from lightning_conv.reporting.series import Series
from lightning_conv.reporting.tags import GROUPS

EVENTS = "events.out.tfevents.*"
METRICS = "metrics.csv"
SETTINGS = "hparams.yaml"

NOT_MEASURED = frozenset({"epoch", "hp_metric"})
"""What loggers write beside what is logged."""

DEEPEST = 4
"""Levels below a folder in which runs are looked for, to name them."""

MOST_NAMED = 5


def read_run(folder: Path, record: str = "convergence.json") -> RunRecord:
    """Read the folder of a run.

    Args:
        folder: Where its logger, or ``ConvergenceReport``, has written. What the logger has stands before what the JSON file has.
        record: Name of the JSON file.

    Raises:
        UsageError: There is no such folder, nothing was logged in it, or a file of it cannot be read.
    """
    if not folder.is_dir():
        kind = "it is a file" if folder.exists() else "there is no such folder"
        raise UsageError(
            f"report: {folder}: {kind}; pass the folder in which a run's logger writes, such as runs/wide_fc/guarded_0 (the line "
            "`logs:` at the end of a run names it)"
        )
    known = folder / record
    series = read_series(folder)
    if not series and not known.is_file():
        raise UsageError(_nothing_logged(folder, record))
    name = "/".join(folder.absolute().parts[-2:])
    settings = _settings(folder)
    if not known.is_file():
        missing = [
            f"There is no {record} in the folder, so nothing is judged: ConvergenceReport, a part of ConvergenceDiagnostics, writes it."
        ]
        return RunRecord(
            name=name,
            series=series,
            settings={"Hyper-parameters": settings} if settings else {},
            metrics=constants_of(folder) | {tag: each.last for tag, each in series.items()},
            steps={tag: each.steps[-1] for tag, each in series.items() if len(each)},
            optimizers=_optimizers(series),
            missing=missing,
        )
    try:
        run = RunRecord.from_json(known.read_text("utf-8"), name=name, series=series)
    except (ValueError, OSError) as error:
        raise UsageError(f"report: {known} cannot be read: {error}; remove it to see what the logger has") from error
    if run.series:
        return run
    nothing = f"There are neither event files nor a metrics.csv in the folder, and no series in {record}, so nothing is drawn."
    return replace(run, missing=[*run.missing, nothing])


def read_series(folder: Path) -> dict[str, Series]:
    """Return what was logged by tag, from all event files and the CSV file of a folder; a file that breaks off is read up to there.

    Args:
        folder: The folder.
    """
    series: dict[str, Series] = {}
    for path in sorted(folder.glob(EVENTS)):  # in the order of time, which is in their names
        _gather(series, _events(path))
    if (path := folder / METRICS).is_file():
        _gather(series, _rows(path))
    return series


def constants_of(folder: Path) -> dict[str, float]:
    """Return what was measured in a run and did not change, from the settings in TensorBoard's event files.

    Args:
        folder: Folder of the run.
    """
    return {tag: value for path in sorted(folder.glob(EVENTS)) for tag, value in _constants(path)}


def _constants(path: Path) -> Iterator[tuple[str, float]]:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for value in (each for event in _read(path) for each in event.summary.value):
        data = value.metadata.plugin_data
        if data.plugin_name == "hparams":
            settings = HParamsPluginData.FromString(data.content).session_start_info.hparams
            yield from ((name, each.number_value) for name, each in settings.items() if name.startswith(GROUPS))


def _gather(series: dict[str, Series], values: Iterator[tuple[str, int, float]]) -> None:
    """Add the values of a file; a run that was resumed goes on from the first step of the new file."""
    for tag, step, value in values:
        if tag not in NOT_MEASURED:
            series.setdefault(tag, Series()).put(step, value)


def _events(path: Path) -> Iterator[tuple[str, int, float]]:
    """Yield tag, step and value of each scalar in an event file.

    Raises:
        UsageError: The file is none of TensorBoard's.
    """
    from tensorboard.util.tensor_util import make_ndarray

    for event in _read(path):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.step, value.simple_value
            elif value.metadata.plugin_data.plugin_name == "scalars" and value.HasField("tensor"):
                yield value.tag, event.step, float(make_ndarray(value.tensor))


def _read(path: Path) -> Iterator[Any]:
    """Yield the events of a file.

    Raises:
        UsageError: The file is none of TensorBoard's.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    try:
        yield from LegacyEventFileLoader(str(path)).Load()
    except Exception as error:  # of TensorBoard's reader, and of protobuf's
        raise UsageError(f"report: {path} cannot be read: {type(error).__name__}: {error}") from error


def _rows(path: Path) -> Iterator[tuple[str, int, float]]:
    """Yield tag, step and value of each cell of a CSV file.

    Raises:
        UsageError: The file is none of CSVLogger's.
    """
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                step = int(float(row["step"]))
                known = [(tag, float(cell)) for tag, cell in row.items() if tag != "step" and cell not in ("", None)]
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(
                    f"report: {path}, line {number} cannot be read ({error!r}); it is to be one of CSVLogger"
                ) from error
            yield from ((tag, step, value) for tag, value in known)


def _settings(folder: Path) -> dict[str, str]:
    """Return the hyper-parameters; empty: there are none, or they are of classes that are not at hand."""
    path = folder / SETTINGS
    try:
        content: Any = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else None
    except (yaml.YAMLError, OSError):
        return {}
    return {str(name): str(value) for name, value in content.items()} if isinstance(content, dict) else {}


def _optimizers(series: dict[str, Series]) -> list[str]:
    """Return the names of the optimizers that have a network of their own: they stand behind the group of a tag."""
    named = {tag.split("/")[1] for tag in series if tag.startswith("kernel/") and tag.count("/") == 2}
    return sorted(named) or [""]


def _nothing_logged(folder: Path, record: str) -> str:
    """Say that a folder is not that of a run, and which ones below it are."""
    below = sorted(
        {
            path.parent
            for level in range(1, DEEPEST)
            for name in (EVENTS, METRICS, record)
            for path in folder.glob("*/" * level + name)
            if path.parent.name != LIMITS
        }
    )
    if below:
        named = ", ".join(str(each) for each in below[:MOST_NAMED])
        more = f" and {len(below) - MOST_NAMED} more" if len(below) > MOST_NAMED else ""
        return f"report: nothing was logged in {folder} itself; runs below it: {named}{more}"
    if (folder / METRICS).is_file() or any(folder.glob(EVENTS)):
        return f"report: nothing was logged in {folder}: its {METRICS} or event files have no values yet, or break off before the first"
    return (
        f"report: nothing was logged in {folder}: it has no {record}, no event file and no metrics.csv; train with "
        "Trainer(callbacks=[ConvergenceDiagnostics()], logger=TensorBoardLogger('runs')) or CSVLogger"
    )
