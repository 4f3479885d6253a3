"""Tags as loggers and file systems accept them: ``metric_names`` and ``path_of``."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import PurePosixPath

from lightning.pytorch.loggers import Logger, MLFlowLogger

LONGEST_METRIC = 250
"""Characters of a name that MLflow stores."""

LONGEST_PART = 80
"""Characters of a part of a path that is made of a tag."""


def metric_names(logger: Logger, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics under names that the logger accepts.

    MLflow has names of up to 250 characters that could be paths, of letters, digits and ``_/. -``. Another name is changed to such a one,
    with a checksum of it at the end, so that two names stay two.

    Args:
        logger: A logger of the trainer.
        metrics: Values by tag.
    """
    if not isinstance(logger, MLFlowLogger):
        return dict(metrics)
    return {mlflow_name(name): value for name, value in metrics.items()}


def mlflow_name(tag: str) -> str:
    """Return the name under which MLflow has a tag.

    Args:
        tag: The tag.

    Example:
        >>> mlflow_name("kernel/lambda_min"), mlflow_name("kernel/nets[0]/lambda_min")
        ('kernel/lambda_min', 'kernel/nets_0_/lambda_min_4ece0cd4')
    """
    name = re.sub(r"[^a-zA-Z0-9_/. -]", "_", tag)
    name = "/".join(part for part in name.split("/") if part.strip("."))
    if name == tag and len(tag) <= LONGEST_METRIC:
        return name
    return f"{name[: LONGEST_METRIC - 9]}_{_checksum(tag)}"


def path_of(tag: str) -> PurePosixPath:
    """Return a tag as a path without an ending, of characters that every file system has; two tags have two paths.

    Args:
        tag: The tag.

    Example:
        >>> str(path_of("kernel/spectrum")), str(path_of("../x"))
        ('kernel/spectrum', 'x_1fb8ad98')
    """
    parts = [re.sub(r"[^a-zA-Z0-9_-]", "_", part)[:LONGEST_PART] for part in tag.split("/") if part.strip(".")]
    path = "/".join(parts)
    return PurePosixPath(path if path == tag else f"{path}_{_checksum(tag)}")


def _checksum(tag: str) -> str:
    return f"{zlib.crc32(tag.encode('utf-8', 'surrogatepass')):08x}"
