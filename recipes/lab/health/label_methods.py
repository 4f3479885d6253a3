"""What each method says of the labels of one run: the network's kernel at three moments, and what it is held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_conv.health.findings.of_labels import knows_by_heart
from lightning_conv.health.labels.audit_labels import audit_labels
from lightning_conv.health.labels.label_margins import gaussian_kernel, label_margins
from lightning_conv.health.labels.suspicious_labels import LabelAudit
from lightning_conv.kernels.gram import ntk_gram
from lightning_conv.recipes.lab.health.label_sets import LabelSet

START, KEPT, END = "kernel, start", "kernel, kept", "kernel, end"
METHODS = (
    START, KEPT, END, "inputs", "features, kept", "features, end", "loss, kept", "loss, end", "5-fold confidence",
)  # fmt: skip
"""``kept``: at the last measurement before the network knows labels by heart, as ``ConvergenceHealth`` does it."""

BATCH = 64
RATE = 2e-3
FOLDS = 5
PART = 128
"""Samples of the smaller audit, as many as a probe has by default."""


@dataclass(frozen=True)
class LabelScores:
    """What was said of one run.

    Attributes:
        scores: By method, (n,); the lowest is the most suspicious.
        audits: By moment (``START``, ``KEPT``, ``END``) and number of samples.
        kept: Epoch of the audit that is kept.
        fitted: Share of the given labels that the network names after training.
    """

    scores: dict[str, Tensor]
    audits: dict[tuple[str, int], LabelAudit]
    kept: int
    fitted: float


def score_labels(data: LabelSet, labels: Tensor, *, seed: int, whole: bool = True) -> LabelScores:
    """Train a network on labels and say by each method which of them are suspicious.

    Args:
        data: The samples.
        labels: Given labels, (n,).
        seed: Of the weights and the order of the batches.
        whole: Whether the methods are scored; otherwise only the audits are made.

    Cost: one to fifteen seconds for 500 samples on one core.
    """
    torch.manual_seed(seed)
    net, x = data.network(), data.inputs
    found = LabelScores({}, {}, 0, 0.0)
    scores, audits, kept, by_heart = found.scores, found.audits, 0, False
    for epoch in train(net, x, labels, data.epochs, seed):
        if not _is_measured(epoch, data.epochs) or (by_heart and epoch < data.epochs):
            continue
        moments = [*([START] if epoch == 0 else []), *([END] if epoch == data.epochs else [])]
        kernel = ntk_gram(net, x, outputs="trace", progress=False).matrix
        audit = audit_labels(kernel, labels)
        by_heart = by_heart or bool(knows_by_heart(outputs_of(net, x), audit))
        if not by_heart or epoch == 0:
            kept, moments = epoch, [*moments, KEPT]
        for moment in moments:
            audits[moment, len(labels)] = audit
            scores[moment] = audit.margins
            if len(labels) > PART:
                audits[moment, PART] = audit_labels(kernel[:PART, :PART], labels[:PART])
        for moment in ("kept", "end") if whole else ():
            if f"kernel, {moment}" in moments:
                scores[f"features, {moment}"] = label_margins(gaussian_kernel(features_of(net, x)), labels).margins
                scores[f"loss, {moment}"] = -F.cross_entropy(outputs_of(net, x), labels, reduction="none")
    if whole:
        scores["inputs"] = label_margins(gaussian_kernel(x), labels).margins
        scores["5-fold confidence"] = fold_confidence(data, labels, seed=seed)
    fitted = float((outputs_of(net, x).argmax(1) == labels).double().mean())
    return LabelScores({name: scores[name] for name in METHODS if name in scores}, audits, kept, fitted)


def train(net: nn.Module, x: Tensor, labels: Tensor, epochs: int, seed: int) -> Iterator[int]:
    """Train by Adam on the cross-entropy, in batches.

    Args:
        net: The network.
        x: Samples.
        labels: Given labels, (n,).
        epochs: Passes over them.
        seed: Of the order.

    Yields:
        The number of epochs done, first 0.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    yield 0
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield epoch


@torch.no_grad()
def outputs_of(net: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of a network, (n, C)."""
    outputs: Tensor = net(x)
    return outputs


@torch.no_grad()
def features_of(net: nn.Sequential, x: Tensor) -> Tensor:
    """Return what enters the last layer, (n, m)."""
    features: Tensor = net[:-1](x)
    return features


def fold_confidence(data: LabelSet, labels: Tensor, *, seed: int) -> Tensor:
    """Return the probability that each given label has in a network that was trained without its fold, (n,).

    Args:
        data: The samples.
        labels: Given labels, (n,).
        seed: Of folds, weights and order.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2000 + seed))
    found = torch.zeros(len(labels))
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        rest = torch.cat([order[other::FOLDS] for other in range(FOLDS) if other != fold])
        torch.manual_seed(seed)
        net = data.network()
        for _ in train(net, data.inputs[rest], labels[rest], data.fold_epochs, seed):
            pass
        shares = outputs_of(net, data.inputs[held]).softmax(1)
        found[held] = shares.gather(1, labels[held][:, None])[:, 0]
    return found


def auc(scores: Tensor, wrong: Tensor) -> float:
    """Return the probability that a wrong label has a lower score than a right one; of equal scores half counts.

    Args:
        scores: (n,), the lowest is the most suspicious.
        wrong: Which labels are wrong, (n,).
    """
    bad, good = scores[wrong][:, None], scores[~wrong][None]
    return float(((bad < good).double() + (bad == good).double() / 2).mean())


def precision_of_top(scores: Tensor, wrong: Tensor, count: int = 20) -> float:
    """Return the share of wrong labels among the most suspicious ones.

    Args:
        scores: As in ``auc``.
        wrong: As in ``auc``.
        count: How many.
    """
    return float(wrong[scores.argsort(stable=True)[:count]].double().mean())


def _is_measured(epoch: int, last: int) -> bool:
    """Return whether an epoch is 0, a power of 2 or the last one."""
    return epoch & (epoch - 1) == 0 or epoch == last
