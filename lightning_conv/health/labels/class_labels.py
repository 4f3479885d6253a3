"""``class_labels``: the class of each sample as one number, from targets in the forms that losses take."""

from __future__ import annotations

import torch
from torch import Tensor

NEITHER = "pass one class number for each sample, rows of one 1 and zeros, or 0 and 1 (-1 and 1) for two classes"


def class_labels(targets: Tensor, samples: int | None = None) -> Tensor:
    """Return the class numbers of the samples, (n,), in int64, on the CPU.

    Args:
        targets: Class numbers, (n,) or (n, 1); rows with one 1 and zeros, (n, C); or, in any floating type, 0 and 1 or -1 and 1.
        samples: Number of samples that there have to be; None: any.

    Raises:
        ValueError: The targets are other numbers (a regression, soft labels), a sample has several labels, a label is negative, such as
            one that ``ignore_index`` leaves out, or there is another number of samples.
        TypeError: The targets are no tensor.

    Example:
        >>> class_labels(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])).tolist()
        [1, 0]
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: {type(targets).__name__}; need a tensor of one label for each sample")
    shape = tuple(targets.shape)
    if not targets.numel() or not shape or (samples is not None and shape[0] != samples):
        of = "" if samples is None else f" for {samples} samples"
        raise ValueError(f"targets: shape {shape}{of}; need one label for each sample")
    found = targets.detach().cpu()
    if found.is_complex() or (found.is_floating_point() and not bool(torch.isfinite(found).all())):
        raise ValueError(f"targets: they are not all finite real numbers; {NEITHER}")
    columns = found.reshape(len(found), -1)
    if columns.shape[1] > 1:
        return _of_rows(columns, shape)
    values = columns[:, 0]
    kinds = set(torch.unique(values)[:3].tolist())
    signs = kinds <= {-1, 1}
    if values.is_floating_point() and not (signs or kinds <= {0, 1}):
        raise ValueError(f"targets: numbers such as {float(values[0]):.4g} of a regression have no classes; {NEITHER}")
    if not signs and bool((values < 0).any()):
        raise ValueError(f"targets: the label {int(values.min())} is negative; leave samples without a label out")
    return values.long()


def _of_rows(columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the column of the one 1 in each row."""
    ones = columns == 1
    if len(shape) > 2 or not bool((ones | (columns == 0)).all()):
        raise ValueError(f"targets: shape {shape}, and not one 1 and zeros for each sample; {NEITHER}")
    if not bool((ones.sum(1) == 1).all()):
        number = int((ones.sum(1) != 1).nonzero()[0])
        raise ValueError(f"targets: sample {number} has {int(ones[number].sum())} labels; need one for each sample")
    return ones.int().argmax(1)
