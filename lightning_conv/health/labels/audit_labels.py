"""``audit_labels``: which labels the other samples contradict, by a kernel that is known, beside what costs less."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_conv.arguments import require_type
from lightning_conv.health.labels.class_labels import class_labels
from lightning_conv.health.labels.label_margins import gaussian_kernel, label_margins, require_ridge
from lightning_conv.health.labels.suspicious_labels import Baseline, LabelAudit
from lightning_conv.networks.inputs import Inputs, input_tensors, sample_count

FEWEST = 10
"""Samples below which nothing is said."""


def audit_labels(
    kernel: Tensor,
    targets: Tensor,
    *,
    inputs: Inputs | None = None,
    features: Tensor | None = None,
    losses: Tensor | None = None,
    ridge: float | None = None,
    left_out: Mapping[Baseline, str] | None = None,
) -> LabelAudit:
    """Audit the labels of samples whose kernel is known.

    Args:
        kernel: K, (n, n), such as the trace kernel of a network.
        targets: As ``class_labels`` takes them.
        inputs: Of the samples; None: the baseline is left out.
        features: Last hidden features, n rows or a multiple; None: the baseline is left out.
        losses: Loss of each sample, (n,); None: the baseline is left out.
        ridge: See ``label_margins``.
        left_out: Why a baseline is not there.

    Raises:
        TypeError: The kernel, the features or the losses are no tensor; otherwise as ``class_labels``.
        ValueError: There are fewer than ``FEWEST`` samples, or no label occurs twice; a baseline is of another number of samples;
            otherwise as ``class_labels`` and ``label_margins``.

    Cost: an eigendecomposition, of the order of n^3 flops and 8 n^2 bytes, for the kernel and for each baseline that has one.
    """
    require_ridge(ridge)
    require_type("kernel", kernel, Tensor, "a matrix (n, n), such as ntk_gram(...).matrix")
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel: shape {tuple(kernel.shape)}; need (n, n)")
    labels = class_labels(targets, len(kernel))
    _require_baselines(inputs, features, losses, len(labels))
    if len(labels) < FEWEST:
        raise ValueError(f"targets: {len(labels)} samples; need at least {FEWEST}")
    classes, counts = torch.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError("targets: one class only, so nothing can be compared; pass samples of at least two classes")
    judged = counts[torch.searchsorted(classes, labels)] > 1
    if not bool(judged.any()):
        raise ValueError(f"targets: each of the {len(classes)} labels occurs once; need classes of several samples")
    missing: dict[Baseline, str] = dict(left_out or {})
    made = label_margins(kernel, labels, ridge=ridge)
    found: dict[Baseline, Tensor] = {}
    rows = None if inputs is None else _rows(inputs)
    if rows is not None:
        found["inputs"] = label_margins(gaussian_kernel(rows), labels).margins
    elif inputs is not None:
        missing["inputs"] = "the inputs are whole numbers or not finite, so that no distance is meant"
    if features is not None:
        if bool(torch.isfinite(features).all()):
            rows = features.reshape(len(labels), -1)
            found["features"] = label_margins(gaussian_kernel(rows), labels).margins
        else:
            missing["features"] = "the features are not finite"
    if losses is not None:
        if bool(losses.isnan().any()):
            missing["loss"] = "a loss is NaN"
        else:
            found["loss"] = -losses.detach().cpu().double()
    return LabelAudit(
        labels=labels,
        margins=made.margins,
        suggested=made.suggested,
        judged=judged,
        ridge=made.ridge,
        baselines=found,
        left_out=missing,
    )


def _require_baselines(inputs: Inputs | None, features: Tensor | None, losses: Tensor | None, samples: int) -> None:
    """Refuse baselines of another number of samples, before the kernel is decomposed."""
    if inputs is not None and sample_count(inputs) != samples:
        raise ValueError(f"inputs: {sample_count(inputs)} samples; need those of the {samples} targets")
    if features is not None:
        require_type("features", features, Tensor, "the last hidden features, (n, m)")
        if features.ndim < 2 or features.numel() % samples or not features.numel():
            raise ValueError(f"features: shape {tuple(features.shape)}; need rows of each of {samples} samples")
    if losses is not None:
        require_type("losses", losses, Tensor, "the loss of each sample, (n,)")
        if losses.shape != (samples,):
            raise ValueError(f"losses: shape {tuple(losses.shape)}; need one for each of {samples} samples")


def _rows(inputs: Inputs) -> Tensor | None:
    """Return the samples as rows of floating numbers; None: they are numbers of tokens, or not finite."""
    tensors = [each.detach().cpu() for each in input_tensors(inputs)]
    known = [each for each in tensors if each.is_floating_point() or each.dtype == torch.uint8]
    if len(known) < len(tensors) or not all(bool(torch.isfinite(each).all()) for each in known):
        return None
    return torch.cat([each.reshape(len(each), -1).double() for each in known], 1)
