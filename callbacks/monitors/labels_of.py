"""``labels_of``: the classes of the samples of a probe, where its targets are classes."""

from __future__ import annotations

from torch import Tensor

from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.health.labels.class_labels import class_labels


def labels_of(kernel: Measurement) -> Tensor | None:
    """Return the class of each sample of the probe; None: the targets are no classes, or most samples are alone in theirs.

    Args:
        kernel: What is measured.
    """
    count = kernel.samples
    try:
        labels = class_labels(kernel.targets, count) if kernel.targets is not None else None
    except (TypeError, ValueError):  # numbers of a regression, soft labels, several labels of a sample
        return None
    return labels if labels is not None and 2 * len(set(labels.tolist())) <= count else None
