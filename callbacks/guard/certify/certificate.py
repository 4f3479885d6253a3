"""The certificate of a trunk on its training set. Few features are held in memory, many are computed strip by strip."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_conv.callbacks.guard.certify.almost_everywhere import (
    SAMPLED,
    certify_almost_everywhere,
    wide_layer,
)
from lightning_conv.callbacks.guard.certify.trunk_rounding import (
    STRIP,
    allowance,
    beyond_rounding,
    reached_in_the_run,
    roundings,
)
from lightning_conv.callbacks.guard.certify.work_folder import work_folder
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.trunk_rows import TrunkRows
from lightning_conv.callbacks.run.guarded import attempted, guarded
from lightning_conv.callbacks.run.ranks import processes_of
from lightning_conv.expressivity import (
    Method,
    RankCertificate,
    StreamPlan,
    certify_expressivity,
    plan_stream,
    too_narrow,
)
from lightning_conv.expressivity.certificate import watched
from lightning_conv.expressivity.certify import is_held
from lightning_conv.reporting.progress import Lines

# Predicted seconds up to which ``"auto"`` proves the rank at the run's own weights, where another method applies.
MODEST = 600.0
KEPT_FROM = 60.0  # predicted seconds from which on the work is kept on disk, in case the run is killed meanwhile
# Seconds for which a process waits for the others: the first one does alone what is not divided.
HOURS = 7200.0


def certify_trunk(
    view: GuardView, method: Method = "auto", targets: Tensor | None = None, root: str | None = None
) -> RankCertificate:
    """Certify that the last layer reaches every target from the trunk as it is (``"alignment"``: the given targets).

    All ranks compute the features, each for its share of the samples. The tiles of a long certificate are divided among them; one that is
    held in memory is rank 0's. Every pass in float64 is watched
    for casts to a narrower type (``RankCertificate.narrow``); with one on any rank nothing is certified.

    Args:
        view: The run.
        method: See ``certify_expressivity``; ``"distinct"`` needs a wide last hidden layer with an analytic activation. ``"auto"``: that of
            the present weights, ``"singular"``; where that is predicted to take more than ten minutes, ``"distinct"``, if there is such
            a layer.
        targets: Targets of all samples, for ``"alignment"``; with ``"auto"`` that is taken where the head is too narrow.
        root: Folder under which a long certificate keeps its work; None: nothing is kept.

    Raises:
        ValueError: ``"distinct"`` does not apply to this network; the message says why.
        MemoryError: The certificate does not fit into memory, and no other method applies.
    """
    if method == "distinct":
        return certify_almost_everywhere(view)
    data, head, network = view.data, view.head, view.network
    if method == "alignment" and head.rows > 1:
        raise ValueError(
            f"method='alignment' is about one row of features per sample, and {view.head_name!r} has {head.rows}; use method='singular'"
        )
    too_few = too_narrow(view.rows, head.width, bias=head.has_bias) is not None
    if is_held(view.rows, head.width, bias=head.has_bias) or method == "alignment":
        # In float32 whatever the model's type: the error of these features is scaled to float64.
        coarse = TrunkRows.of(data, network, head, torch.float32).all()
        rows = TrunkRows.of(data, network, head, torch.float64)
        exact = rows.all()
        error, apart = allowance(coarse, exact, rows), float((coarse.double() - exact).norm())

        def certify(feature_error: float) -> RankCertificate:
            return certify_expressivity(
                exact,
                method=method,
                bias=head.has_bias,
                feature_error=feature_error,
                same_inputs=view.same_inputs,
                targets=targets if too_few or method == "alignment" else None,
                narrow=rows.narrow,
            )

        if head.module.weight.dtype == torch.float64:
            return data.ranks.once(lambda: certify(error))
        return data.ranks.once(lambda: _as_in_the_run(certify(error), apart, coarse, certify, bias=head.has_bias))
    return _streamed(view, method, root)


def _as_in_the_run(
    found: RankCertificate, apart: float, coarse: Tensor, again: Callable[[float], RankCertificate], *, bias: bool
) -> RankCertificate:
    if found.method == "alignment":
        return reached_in_the_run(found, apart, again)
    return beyond_rounding(found, apart, coarse, bias=bias)


def _streamed(view: GuardView, method: Method, root: str | None) -> RankCertificate:
    data, head, network = view.data, view.head, view.network
    rows = TrunkRows.of(data, network, head, torch.float64)
    began = time.perf_counter()
    row_seconds = (time.perf_counter() - began) / len(rows.rows(0, SAMPLED))
    plan = data.ranks.once(lambda: _planned(view.rows, head.width, row_seconds, data.ranks.world))
    if method == "auto" and (isinstance(plan, str) or plan.seconds > MODEST):
        found = _instead(view, plan)
        if found is not None:
            return found
    if isinstance(plan, str):
        raise MemoryError(plan)
    (error, apart), seen = roundings(view, rows), rows.narrowing
    processes = processes_of(view.trainer, HOURS)
    with ExitStack() as stack:

        def prepare() -> Path | None:
            keep = data.ranks.rank == 0 and root is not None and plan.seconds >= KEPT_FROM
            folder = stack.enter_context(work_folder(str(root), plan.matrix_bytes)) if keep else None
            kept = f"; kept in {folder}, where a run that is killed meanwhile goes on" if folder is not None else ""
            now = plan_stream(view.rows, head.width, folder=folder, row_seconds=row_seconds, processes=data.ranks.world)
            rank_zero_info(f"ExpressivityGuard: {now}{kept}")
            return folder

        made = certify_expressivity(
            rows,
            method="singular",
            bias=head.has_bias,
            feature_error=error,
            same_inputs=view.same_inputs,
            folder=data.ranks.alike(prepare),
            progress=Lines(rank_zero_info, "ExpressivityGuard: certificate"),
            processes=processes,
        )
    found = watched(made, rows.narrow, allowed_for=rows.narrowing == seen)
    return found if head.module.weight.dtype == torch.float64 else beyond_rounding(found, apart)


def _planned(samples: int, width: int, row_seconds: float, processes: int) -> StreamPlan | str:
    """Return the plan, or why there is none."""
    try:
        return plan_stream(samples, width, row_seconds=row_seconds, processes=processes)
    except MemoryError as error:
        return str(error)


def _instead(view: GuardView, plan: StreamPlan | str) -> RankCertificate | None:
    """Return the proof for almost every weight, where the one for these weights takes long; None, and a message, where there is none."""
    takes = f"cannot be had ({plan})" if isinstance(plan, str) else f"would take about {plan.seconds / 60:.0f} minutes"
    wide = wide_layer(view)
    if isinstance(wide, str):
        rank_zero_info(f"ExpressivityGuard: no shorter proof than that at these weights applies: {wide}")
        return None
    rank_zero_info(
        f"ExpressivityGuard: method='auto': a proof at these very weights {takes}, so rank n is proven at almost every weight of "
        f"{wide.name!r}; pass method='singular' for the former"
    )
    with attempted(MemoryError, RuntimeError, ValueError) as attempt:  # the other proof is still there
        found = certify_almost_everywhere(view)
    if attempt.failed:
        rank_zero_info(f"ExpressivityGuard: method='distinct' failed ({attempt.reason})")
        return None
    if found.verdict == "undecided":
        rank_zero_info(f"ExpressivityGuard: {found.reason}")
        return None
    return replace(found, reason=f"{found.reason} (a proof at these very weights, method='singular', {takes})")


# A moment of the run at which a rank is certified that decides nothing.
Moment: TypeAlias = Literal["at_start", "before_noise"]


def rank_at(moment: Moment, view: GuardView) -> dict[str, float]:
    """Return the certified rank and sigma_min at the present weights, named after the moment.

    Args:
        moment: Moment of the run.
        view: The run.

    Returns:
        An empty dict, with a warning, where they could not be computed.

    Cost: a certificate by the present weights (``"singular"``), whatever the method of the switch.
    """
    what = f"ExpressivityGuard: no rank {moment.replace('_', ' ')}"
    with guarded(None, what, expects=(MemoryError, RuntimeError, ValueError)):
        found = certify_trunk(view, "singular")
        numbers = {f"rank_{moment}": float(found.rank_lower)}
        if (sigma := found.sigma_min) is not None:
            numbers |= {f"sigma_min_{moment}": sigma.value, f"sigma_min_{moment}_lower": sigma.lower}
        return numbers
    return {}


def rewatched(view: GuardView, certificate: RankCertificate) -> RankCertificate:
    """Return a certificate of an earlier version, whose features were not watched for casts, with what they show now.

    Args:
        view: The run, with the trunk of the certificate.
        certificate: The certificate.

    Cost: a pass over the training set in float64.
    """
    if certificate.narrow is not None:
        return certificate
    rows = TrunkRows.of(view.data, view.network, view.head, torch.float64)
    for start in range(0, rows.samples, STRIP):
        rows.rows(start, start + STRIP)
    return watched(certificate, rows.narrow, allowed_for=False)
