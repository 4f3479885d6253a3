"""Finding about labels that the other samples contradict, and at which moment of a run they are to be asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_conv.health.finding import Finding, Level
from lightning_conv.health.labels.suspicious_labels import LabelAudit
from lightning_conv.health.wording import counted, figure, percent

FAR = -0.5
"""Margin from which on a label counts as contradicted. The limits here were chosen in runs of the study that its page does not have."""

MATTERS = 0.03
"""Share of contradicted labels from which on there is a notice."""

LEAST = 5
"""Contradicted labels that a notice needs."""

PREDICTED = 2 / 3
"""Share of the labels that the other samples have to predict, so that their word counts."""


def finding_of_labels(
    audit: LabelAudit, *, numbers: Sequence[int] | None = None, of: str = "the probe", step: int | None = None
) -> Finding:
    """Judge the labels of some samples.

    Args:
        audit: The audit.
        numbers: Number of each sample in the training set; None: not known.
        of: Which samples, in words.
        step: Step of the audit.

    Returns:
        ``notice``: at least ``LEAST`` labels and a share of ``MATTERS`` have a margin of ``FAR`` or below, and the other samples predict
        at least ``PREDICTED`` of all labels. ``ok``: everything else.

    Raises:
        ValueError: There are other numbers than one for each sample.
    """
    audit.require_numbers(numbers)
    judged, far = int(audit.judged.sum()), len(audit.beyond(FAR))
    needed = max(LEAST, math.ceil(MATTERS * judged))
    first = audit.top(1)[0]
    named = f"sample {first.number} of {of}" if numbers is None else f"training sample {numbers[first.number]:,}"
    says = f"labelled {first.given}, and the other {audit.samples - 1} samples of {of} say {first.suggested}"
    level: Level = "ok"
    advice = ""
    if audit.agreement < PREDICTED:
        words = (
            f"The other samples of {of} predict {percent(audit.agreement)} of the labels, which is too few (limit {percent(PREDICTED)}) to "
            "call one of them suspicious"
        )
    elif first.suggested == first.given:
        words = f"No label of {of} is contradicted by the other samples (smallest margin {figure(first.margin)})"
    elif far >= needed:
        level = "notice"
        words = (
            f"{named[0].upper()}{named[1:]} is {says} (margin {figure(first.margin)}); {far} of {judged} labels have a margin of {FAR} or "
            f"below, which among right labels is unusual from {needed} on"
        )
        advice = "Look at these labels first; the table of labels has them in order."
    else:
        words = f"The most doubtful label is that of {named}: it is {says} (margin {figure(first.margin)}, limit {FAR})"
        if far:
            words += f"; {counted(far, 'label')} of {judged} {'is' if far == 1 else 'are'} beyond it (a notice needs {needed})"
    return Finding(
        name="labels",
        level=level,
        sentence=f"{words}.",
        value=first.margin,
        limit=FAR,
        step=step,
        advice=advice,
    )


def fitted_share(outputs: Tensor, audit: LabelAudit) -> float | None:
    """Return the share of the judged labels that the network's own outputs name.

    Several outputs name the class of the largest one. A single one names one of two classes by its sign, or, if all outputs lie between 0
    and 1 as the labels do, by which of these is nearer.

    Args:
        outputs: u, (n, C), one column for each class number, or one for two classes.
        audit: Of the same samples.

    Returns:
        The share; None: the outputs are no scores of these classes.

    Raises:
        ValueError: The outputs are not those of the samples.
    """
    if outputs.ndim != 2 or len(outputs) != audit.samples:
        raise ValueError(f"outputs: shape {tuple(outputs.shape)}; need (n, C) for {audit.samples} samples")
    u, labels = outputs.detach().cpu().double(), audit.labels
    if u.shape[1] == 1 and len(torch.unique(labels)) == 2:
        middle = 0.5 if set(torch.unique(labels).tolist()) == {0, 1} and bool(((u >= 0) & (u <= 1)).all()) else 0.0
        named = (u[:, 0] > middle) == (labels == labels.max())
    elif u.shape[1] > max(1, int(labels.max())) and int(labels.min()) >= 0:
        named = u.argmax(1) == labels
    else:
        return None
    return float(named[audit.judged].double().mean())


def knows_by_heart(outputs: Tensor, audit: LabelAudit) -> bool | None:
    """Return whether the network names more of the given labels than the other samples predict.

    From then on it has learned labels that nothing but themselves suggests, and its kernel supports wrong ones, too: a later audit finds
    fewer of them. So the last audit before that is the one to keep.

    Args:
        outputs: See ``fitted_share``.
        audit: Of the same samples, at the same weights.

    Returns:
        None: the outputs are no scores of these classes.
    """
    fitted = fitted_share(outputs, audit)
    return None if fitted is None else fitted > audit.agreement


def traced(matrix: Tensor, outputs: int) -> Tensor:
    """Return the trace kernel, (n, n), of a full one, (n C, n C).

    Args:
        matrix: With the row i C + c for output c of sample i.
        outputs: C.

    Raises:
        ValueError: The size of the matrix is no multiple of C.
    """
    if outputs < 1 or len(matrix) % outputs:
        raise ValueError(f"outputs: {outputs}; need a divisor of the size of the matrix, {len(matrix)}")
    samples = len(matrix) // outputs
    return torch.einsum("icjc->ij", matrix.reshape(samples, outputs, samples, outputs))
