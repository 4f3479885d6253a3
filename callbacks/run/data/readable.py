"""``why_unreadable``: whether samples that workers read for the training step can be read in the main process as well."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset

from lightning_conv.callbacks.run.data.data_generators import unread
from lightning_conv.callbacks.run.guarded import attempted

FEW = 2
"""Samples that are read to find it out."""


def why_unreadable(samples: Dataset[Any], loader: DataLoader[Any]) -> str:
    """Return why the samples cannot be read in this process; empty if they can, or if the training step reads them here anyway.

    A data set may ask which worker it is in, or use what ``worker_init_fn`` has opened. Generators are put back.

    Args:
        samples: The samples that the run trains on, by index.
        loader: The run's training loader.

    Cost: ``FEW`` samples are read.
    """
    if not loader.num_workers:
        return ""
    with attempted(Exception) as attempt, unread(samples, loader.collate_fn):  # it is any code of the user's
        loader.collate_fn([samples[index] for index in range(min(FEW, len(samples)))])  # type: ignore[arg-type]
    return attempt.reason
