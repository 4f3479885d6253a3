"""``label_audit``: which labels the other samples contradict, by the network's own kernel, beside what costs less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_conv.health.class_labels import class_labels
from lightning_conv.health.label_margins import gaussian_kernel, label_margins
from lightning_conv.health.suspicious_labels import Baseline, LabelAudit
from lightning_conv.kernels.gram import ntk_gram
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.losses.per_sample import SampleLosses
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.head import find_head
from lightning_conv.networks.hidden_features import last_hidden_features
from lightning_conv.networks.inputs import Inputs, input_tensors, sample_count
from lightning_conv.networks.undisturbed import undisturbed

FEWEST = 10
"""Samples below which nothing is said."""

PROJECTED = 32
"""Number of outputs from which on the kernel is estimated by random projections rather than computed."""

FAILURES = (ValueError, TypeError, RuntimeError, NotImplementedError)
"""What finding a head and evaluating a loss fail by, for a network or a loss that has none of that form."""


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
        ValueError: There are fewer than ``FEWEST`` samples, or no label occurs twice; otherwise as ``class_labels`` and
            ``label_margins``.

    Cost: an eigendecomposition, of the order of n^3 flops and 8 n^2 bytes, for the kernel and for each baseline that has one.
    """
    if kernel.ndim != 2:
        raise ValueError(f"kernel: shape {tuple(kernel.shape)}; need (n, n)")
    labels = class_labels(targets, len(kernel))
    if len(labels) < FEWEST:
        raise ValueError(f"targets: {len(labels)} samples; need at least {FEWEST}")
    classes, counts = torch.unique(labels, return_counts=True)
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
        if losses.shape != labels.shape:
            raise ValueError(f"losses: shape {tuple(losses.shape)}; need one for each of {len(labels)} samples")
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


def label_audit(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    outputs: Literal["trace", "projected"] | None = None,
    ridge: float | None = None,
    precision: Precision = "fast",
    batch_norm: BatchNormMode = "eval",
    max_memory: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> LabelAudit:
    """Find the labels that the other samples contradict most, at the present weights.

    A label is judged by the kernel ridge regression on all other samples, with the network's neural tangent kernel, trained or not. The
    model stays as it is. Beside the margins stand three baselines (``suspicious_labels.BASELINES``): often one of them is as good
    (``docs/results/health/health_labels.md``).

    Args:
        model: Network with samples along dimension 0 of its outputs.
        inputs: n samples, see ``ntk_gram``.
        targets: Labels, see ``class_labels``.
        loss_fn: Of (outputs, targets), for the baseline; None: cross-entropy, for a single output that of its logit.
        outputs: ``"trace"``: the kernel summed over the outputs. ``"projected"``: an estimate of it. None: the former up to ``PROJECTED``
            outputs.
        ridge: See ``label_margins``.
        precision: See ``ntk_gram``.
        batch_norm: See ``ntk_gram``; not ``"batch"``, since the samples are then no longer separate.
        max_memory: See ``ntk_gram``.
        seed: Of the projections.
        progress: See ``ntk_gram``.

    Raises:
        ValueError: The targets are no labels, of one class, or of too few samples; the inputs are not finite; otherwise as ``ntk_gram``.
        TypeError: See ``ntk_gram``.

    Cost: one ``ntk_gram`` on n samples and two passes forward; then three eigendecompositions of the order of n^3 flops and 8 n^2 bytes
    each. Seconds for a thousand samples of a small network.

    Example:
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> labels = (x[:, 0] > 0).long()
        >>> labels[3] = 1
        >>> label_audit(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)), x, labels).top(1)[0].number
        3
    """
    if batch_norm == "batch":
        raise ValueError('batch_norm: "batch"; need "eval" or "frozen", since no sample is left out of the batch')
    labels = class_labels(targets, sample_count(inputs))
    if len(labels) < FEWEST or len(torch.unique(labels)) in (1, len(labels)):
        audit_labels(torch.eye(len(labels)), targets)  # refuses, before anything expensive
    u = _outputs(model, inputs, batch_norm)
    kind = outputs or ("trace" if u.shape[1] <= PROJECTED else "projected")
    gram = ntk_gram(
        model,
        inputs,
        outputs=kind,
        precision=precision,
        batch_norm=batch_norm,
        max_memory=max_memory,
        seed=seed,
        progress=progress,
    )
    left_out: dict[Baseline, str] = {}
    features, losses = None, None
    try:
        features = last_hidden_features(model, find_head(model, inputs), inputs).cpu()
    except FAILURES as error:
        left_out["features"] = str(error)
    try:
        losses = sample_losses(u, targets.detach().cpu(), labels, loss_fn)
    except FAILURES as error:
        left_out["loss"] = str(error)
    return audit_labels(
        gram.matrix, targets, inputs=inputs, features=features, losses=losses, ridge=ridge, left_out=left_out
    )


def sample_losses(
    outputs: Tensor, targets: Tensor, labels: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """Return the loss of each sample, (n,).

    Args:
        outputs: u, (n, C).
        targets: As the loss takes them.
        labels: Class numbers of the samples, (n,).
        loss_fn: Of (outputs, targets); None: cross-entropy of the labels, for one output that of its logit.

    Raises:
        ValueError: The loss does not belong to these outputs and targets, or gives no losses of samples.
    """
    u = outputs.detach().cpu().double()
    if loss_fn is None:
        single = u.shape[1] == 1
        loss_fn = nn.BCEWithLogitsLoss() if single else nn.CrossEntropyLoss()
        targets = (labels > labels.min()).double() if single else labels
    losses = SampleLosses(loss_fn, targets, outputs=u.shape[1])
    if losses.kind == "custom":
        raise ValueError("loss_fn: not one of torch's losses whose formula for a sample is known")
    return losses.each(u, slice(None))


def _outputs(model: nn.Module, inputs: Inputs, batch_norm: BatchNormMode) -> Tensor:
    """Return u, (n, C)."""
    with undisturbed(model), torch.no_grad():
        module = StatelessModule(model, batch_norm=batch_norm, statistics_of=inputs)
        return module.outputs({}, module.convert(inputs))


def _rows(inputs: Inputs) -> Tensor | None:
    """Return the samples as rows of floating numbers; None: they are numbers of tokens, or not finite."""
    tensors = [each.detach().cpu() for each in input_tensors(inputs)]
    known = [each for each in tensors if each.is_floating_point() or each.dtype == torch.uint8]
    if len(known) < len(tensors) or not all(bool(torch.isfinite(each).all()) for each in known):
        return None
    return torch.cat([each.reshape(len(each), -1).double() for each in known], 1)
