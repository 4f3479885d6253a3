"""``label_audit``: which labels the other samples contradict, by the network's own kernel, beside what costs less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_conv.arguments import require_option, require_seed
from lightning_conv.health.labels.audit_labels import FEWEST, audit_labels
from lightning_conv.health.labels.class_labels import class_labels
from lightning_conv.health.labels.label_margins import require_ridge
from lightning_conv.health.labels.suspicious_labels import Baseline, LabelAudit
from lightning_conv.health.layers.checked import outputs_of
from lightning_conv.kernels.gram import ntk_gram
from lightning_conv.kernels.products.precision import PRECISIONS, Precision
from lightning_conv.kernels.reading.samples import require_float_inputs
from lightning_conv.losses.per_sample import SampleLosses, require_loss
from lightning_conv.machine.memory import whole_bytes
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.head import find_head
from lightning_conv.networks.hidden_features import last_hidden_features
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.supported import require_module
from lightning_conv.reporting.progress import require_report

PROJECTED = 32
"""Number of outputs from which on the kernel is estimated by random projections rather than computed."""

FAILURES = (ValueError, TypeError, RuntimeError, NotImplementedError)
"""What finding a head and evaluating a loss fail by, for a network or a loss that has none of that form."""


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
        ValueError: An option is unknown; the targets are no labels, of one class, or of too few samples; the inputs are not finite;
            otherwise as ``ntk_gram``.
        TypeError: ``loss_fn`` cannot be called; otherwise as ``ntk_gram``.

    Cost: one ``ntk_gram`` on n samples and two passes forward; then three eigendecompositions of the order of n^3 flops and 8 n^2 bytes
    each. Seconds for a thousand samples of a small network.

    Example:
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> labels = (x[:, 0] > 0).long()
        >>> labels[3] = 1
        >>> label_audit(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)), x, labels).top(1)[0].number
        3
    """
    _require_options(outputs, precision, batch_norm, max_memory)
    require_module(model)
    require_ridge(ridge)
    require_seed(seed)
    require_report(progress)
    if loss_fn is not None:
        require_loss(loss_fn)
    require_float_inputs(inputs, partial(outputs_of, model, inputs, batch_norm))
    labels = class_labels(targets, sample_count(inputs))
    if len(labels) < FEWEST or len(torch.unique(labels)) in (1, len(labels)):
        audit_labels(torch.eye(len(labels)), targets)  # refuses, before anything expensive
    u = outputs_of(model, inputs, batch_norm)
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


def _require_options(outputs: object, precision: object, batch_norm: object, max_memory: object) -> None:
    require_option("outputs", outputs, (None, "trace", "projected"))
    require_option("precision", precision, PRECISIONS)
    if batch_norm == "batch":
        raise ValueError('batch_norm: "batch"; need "eval" or "frozen", since no sample is left out of the batch')
    require_option("batch_norm", batch_norm, ("eval", "frozen"))
    if max_memory is not None:
        whole_bytes(max_memory)


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
        TypeError: ``loss_fn`` cannot be called.
        ValueError: The loss does not belong to these outputs and targets, or gives no losses of samples.
    """
    if outputs.ndim != 2 or not len(outputs) == len(targets) == len(labels):
        raise ValueError(
            f"outputs: shape {tuple(outputs.shape)} for {len(targets)} targets and {len(labels)} labels; need (n, C), and n of both"
        )
    u = outputs.detach().cpu().double()
    if loss_fn is None:
        single = u.shape[1] == 1
        loss_fn = nn.BCEWithLogitsLoss() if single else nn.CrossEntropyLoss()
        targets = (labels > labels.min()).double() if single else labels
    losses = SampleLosses(loss_fn, targets, outputs=u.shape[1])
    if losses.kind == "custom":
        raise ValueError("loss_fn: not one of torch's losses whose formula for a sample is known")
    return losses.each(u, slice(None))
