"""Rank n for almost every weight (``method="distinct"``), and the rank of a sample of the rows at the present weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.trunk_rounding import allowance, beyond_rounding
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.data.trunk_rows import TrunkRows
from lightning_conv.expressivity import RankCertificate, certify_expressivity
from lightning_conv.networks.head import Head
from lightning_conv.networks.wide_layer import WideLayer, find_wide_layer

SAMPLED = 512  # samples on which the rounding inside the trunk is measured where there are many
FAR = 64  # of them those of the largest inputs of the wide layer
# Samples on which the whole trunk is watched for casts where only what lies below the wide layer is computed.
WATCHED = 32


def wide_layer(view: GuardView) -> WideLayer | str:
    """Return the wide last hidden layer if it computes the head's features on every training sample; otherwise why there is none.

    Args:
        view: The run. All ranks get the same.

    Cost: a pass over the training set in the run's precision.
    """
    found = view.data.collect(lambda inputs, _: _named(find_wide_layer(view.network, view.head, inputs)))
    if refused := next((why for name, why in found if not name), ""):
        return refused
    if len({name for name, _ in found}) > 1:
        return "it is another layer for some samples than for others"
    return find_wide_layer(view.network, view.head, view.data.first_inputs())


def _named(found: WideLayer | str) -> tuple[str, str]:
    return ("", found) if isinstance(found, str) else (found.name, "")


def certify_almost_everywhere(view: GuardView) -> RankCertificate:
    """Certify rank n at almost every weight of the wide layer, from what enters it.

    Args:
        view: The run.

    Raises:
        ValueError: There is no such layer; the message says why.
    """
    wide = wide_layer(view)
    if isinstance(wide, str):
        raise ValueError(f'method="distinct" does not apply: {wide}; use method="singular"')
    data, head, network, layer = view.data, view.head, view.network, Head(wide.name, wide.module)
    if head.rows > 1:
        raise ValueError(
            f"method='distinct' is about one row of features per sample, and {view.head_name!r} has {head.rows}; use method='singular'"
        )
    # The wide layer itself is computed for a few samples only, to see whether it casts: in float64 all of them would take longer than all
    # that lies before it.
    coarse = TrunkRows.of(data, network, layer, torch.float32, stop=True).all()
    below = TrunkRows.of(data, network, layer, torch.float64, stop=True)
    exact = below.all()
    rows = TrunkRows.of(data, network, head, torch.float64)
    rows.rows(0, WATCHED)
    error = allowance(coarse, exact, below)
    found = data.ranks.once(
        lambda: certify_expressivity(
            rows,
            method="distinct",
            bias=head.has_bias,
            entering=exact,
            feature_error=error,
            narrow=below.narrow or rows.narrow,
        )
    )
    return _also_here(view, found, exact.flatten(1).norm(dim=1)) if found.verdict == "certified" else found


def _also_here(view: GuardView, found: RankCertificate, sizes: Tensor) -> RankCertificate:
    """Certify the rank of a sample of the rows at the present weights, which are not almost every weight: the largest, and random ones.

    Full rank of a subset is necessary for rank n, and not sufficient; where the sample is the whole set it is a proof.

    Args:
        view: The run.
        found: Certificate for almost every weight.
        sizes: Norm of what enters the wide layer, of each sample: far out an activation is its asymptote.

    Returns:
        It with ``rows_here`` and ``rank_here``; ``undecided`` where some rank is missing.
    """
    data, head, network = view.data, view.head, view.network
    order, far = torch.randperm(data.size, generator=torch.Generator().manual_seed(0)), sizes.argsort(descending=True)
    chosen = sorted([*dict.fromkeys([*far[:FAR].tolist(), *order.tolist()])][:SAMPLED])
    coarse = TrunkRows.of(data, network, head, torch.float32).at(chosen)
    trunk = TrunkRows.of(data, network, head, torch.float64)
    exact = trunk.at(chosen)
    here = data.ranks.once(
        lambda: certify_expressivity(
            exact,
            method="singular",
            bias=head.has_bias,
            feature_error=allowance(coarse, exact, trunk),
            narrow=trunk.narrow,
        )
    )
    if head.module.weight.dtype != torch.float64:
        here = beyond_rounding(here, float((coarse.double() - exact).norm()), coarse, bias=head.has_bias)
    rows, rank = len(chosen), here.rank_lower
    which = f"{rows} rows, the largest and some drawn at random," if rows < data.size else f"all {rows} rows"
    reason = f"{found.reason}; at these weights the rank of {which} is certified to be {rank}"
    if here.verdict == "certified":
        found = replace(found, reason=reason, rows_here=rows, rank_here=rank)
        return replace(found, rounding=here.rounding, sigma_min=here.sigma_min) if here.rounding else found
    reason = f"{reason} and not shown to be {rows} in the run, so nothing is said of these weights ({here.reason})"
    return replace(found, verdict="undecided", rank_lower=rank, reason=reason, rows_here=rows, rank_here=rank)
