"""The certificate of a trunk on its training set: features held where they are few, computed strip by strip where they are many."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_conv.callbacks.guard.certify.kept_folder import kept_folder
from lightning_conv.callbacks.run.ranks import Led
from lightning_conv.callbacks.run.training_set import TrainingSet, TrunkRows
from lightning_conv.expressivity import (
    Method,
    RankCertificate,
    StreamPlan,
    certify_expressivity,
    plan_stream,
    too_narrow,
)
from lightning_conv.expressivity.certify import is_held
from lightning_conv.expressivity.singular import feature_rounding
from lightning_conv.networks.head import Head
from lightning_conv.networks.wide_layer import find_wide_layer
from lightning_conv.reporting.progress import Lines

SAMPLED = 512
"""Samples on which the rounding inside the trunk is measured where there are many."""
MODEST = 600.0
"""Predicted seconds up to which ``"auto"`` proves the rank at the very weights of the run, where something else is possible."""
KEPT_FROM = 60.0
"""Predicted seconds from which on the work is kept on disk, for a run that is killed meanwhile."""


def certify_trunk(
    data: TrainingSet,
    network: nn.Module,
    head: Head,
    method: Method = "auto",
    targets: Tensor | None = None,
    root: str | None = None,
) -> RankCertificate:
    """Certify that the last layer reaches every target from the trunk as it is (``"alignment"``: the targets that there are).

    The features are computed by all ranks, each its share of the samples; the certificate by rank 0.

    Args:
        data: the training set.
        network: that takes its inputs.
        head: of the network.
        method: see ``certify_expressivity``; ``"distinct"`` needs a wide last hidden layer with an analytic activation. ``"auto"``: that of
            the present weights, ``"singular"``; where that is predicted to take more than ten minutes, ``"distinct"``, if there is such
            a layer.
        targets: of all samples, for ``"alignment"``; with ``"auto"`` it is taken where the head is too narrow.
        root: folder under which a long certificate keeps its work; None: nothing is kept.

    Raises:
        ValueError: ``"distinct"`` does not apply to this network, and why.
    """
    if method == "distinct":
        return _distinct(data, network, head)
    narrow = too_narrow(data.size, head.width, bias=head.has_bias) is not None
    if is_held(data.size, head.width, bias=head.has_bias) or method == "alignment":
        # In float32 whatever the model's type: the error of these features is scaled to float64.
        coarse = data.features(network, head, torch.float32)
        exact = data.features(network, head, torch.float64)
        return data.ranks.once(
            lambda: certify_expressivity(
                coarse,
                method=method,
                bias=head.has_bias,
                recompute=lambda: exact,
                same_inputs=data.same_inputs,
                targets=targets if narrow or method == "alignment" else None,
            )
        )
    return _streamed(data, network, head, method, root)


def _streamed(data: TrainingSet, network: nn.Module, head: Head, method: Method, root: str | None) -> RankCertificate:
    rows = data.feature_rows(network, head, torch.float64)
    coarse = data.feature_rows(network, head, torch.float32).rows(0, SAMPLED)
    began = time.perf_counter()
    exact = rows.rows(0, SAMPLED)
    row_seconds = (time.perf_counter() - began) / len(exact)
    error = feature_rounding(coarse, exact) * max(1.0, data.size / SAMPLED) ** 0.5
    plan = data.ranks.once(lambda: _planned(data.size, head.width, row_seconds))
    if method == "auto" and (isinstance(plan, str) or plan.seconds > MODEST):
        found = _instead(data, network, head, plan)
        if found is not None:
            return found
    if isinstance(plan, str):
        raise MemoryError(plan)
    led = Led(data.ranks, rows.rows)
    source = rows if data.ranks.world == 1 else LedRows(led, rows)

    def lead() -> RankCertificate:
        keep = root is not None and plan.seconds >= KEPT_FROM
        with kept_folder(str(root), plan.matrix_bytes) if keep else nullcontext() as folder:
            kept = f"; kept in {folder}, where a run that is killed meanwhile goes on" if folder is not None else ""
            now = plan_stream(data.size, head.width, folder=folder, row_seconds=row_seconds)
            rank_zero_info(f"ExpressivityGuard: {now}{kept}")
            return certify_expressivity(
                source, method="singular", bias=head.has_bias, feature_error=error, same_inputs=data.same_inputs, folder=folder,
                progress=Lines(rank_zero_info, "ExpressivityGuard: certificate"),
            )  # fmt: skip

    return led.run(lead)


def _planned(samples: int, width: int, row_seconds: float) -> StreamPlan | str:
    """The plan, or why there is none."""
    try:
        return plan_stream(samples, width, row_seconds=row_seconds)
    except MemoryError as error:
        return str(error)


def _instead(data: TrainingSet, network: nn.Module, head: Head, plan: StreamPlan | str) -> RankCertificate | None:
    """The proof for almost every weight, where the one for these weights takes long; None: there is none, and it is said why."""
    takes = f"cannot be had ({plan})" if isinstance(plan, str) else f"would take about {plan.seconds / 60:.0f} minutes"
    wide = find_wide_layer(network, head, data.first_inputs())
    if isinstance(wide, str):
        rank_zero_info(f"ExpressivityGuard: no shorter proof than that at these weights applies: {wide}")
        return None
    rank_zero_info(
        f"ExpressivityGuard: method='auto': a proof at these very weights {takes}, so rank n is proven at almost every weight of "
        f"{wide.name!r}; pass method='singular' for the former"
    )
    try:
        found = _distinct(data, network, head)
    except Exception as error:  # the other proof is still there
        rank_zero_info(f"ExpressivityGuard: method='distinct' went wrong ({type(error).__name__}: {error})")
        return None
    if found.verdict == "undecided":
        rank_zero_info(f"ExpressivityGuard: {found.reason}")
        return None
    return replace(found, reason=f"{found.reason} (a proof at these very weights, method='singular', {takes})")


def _distinct(data: TrainingSet, network: nn.Module, head: Head) -> RankCertificate:
    """Rank n at almost every weight of the wide layer, from what enters it.

    Raises:
        ValueError: there is no such layer, and why.
    """
    wide = find_wide_layer(network, head, data.first_inputs())
    if isinstance(wide, str):
        raise ValueError(f'method="distinct" does not apply: {wide}; use method="singular"')
    layer = Head(wide.name, wide.module)
    # The wide layer itself is not computed: in float64 it would take longer than all that lies before it.
    coarse, exact = (data.features(network, layer, dtype, stop=True) for dtype in (torch.float32, torch.float64))
    error = feature_rounding(coarse, exact)
    rows = data.feature_rows(network, head)  # for their number and width: none is computed
    return data.ranks.once(
        lambda: certify_expressivity(rows, method="distinct", bias=head.has_bias, entering=exact, feature_error=error)
    )


@dataclass(frozen=True)
class LedRows:
    """Rows that rank 0 asks for and all ranks compute."""

    led: Led
    source: TrunkRows

    @property
    def samples(self) -> int:
        """n."""
        return self.source.samples

    @property
    def width(self) -> int:
        """m_H."""
        return self.source.width

    def rows(self, start: int, stop: int) -> Tensor:
        """h of some samples."""
        return self.led.ask(start, stop)
