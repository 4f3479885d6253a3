"""The certificate of a trunk on its training set: features held where they are few, computed strip by strip where they are many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.anatomy import Head
from lightning_conv.callbacks.guard.ranks import Led
from lightning_conv.callbacks.guard.training_set import TrainingSet, TrunkRows
from lightning_conv.expressivity import Method, RankCertificate, certify_expressivity, too_narrow
from lightning_conv.expressivity.certify import is_held
from lightning_conv.expressivity.singular import feature_rounding
from lightning_conv.wide_layer import find_wide_layer

SAMPLED = 512
"""Samples on which the rounding inside the trunk is measured where there are many."""


def certify_trunk(
    data: TrainingSet, network: nn.Module, head: Head, method: Method = "auto", targets: Tensor | None = None
) -> RankCertificate:
    """Certify that the last layer reaches every target from the trunk as it is (``"alignment"``: the targets that there are).

    The features are computed by all ranks, each its share of the samples; the certificate by rank 0.

    Args:
        data: the training set.
        network: that takes its inputs.
        head: of the network.
        method: see ``certify_expressivity``; ``"distinct"`` needs a wide last hidden layer with an analytic activation.
        targets: of all samples, for ``"alignment"``; with ``"auto"`` it is taken where the head is too narrow.

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
    rows = data.feature_rows(network, head, torch.float64)
    coarse = data.feature_rows(network, head, torch.float32).rows(0, SAMPLED)
    error = feature_rounding(coarse, rows.rows(0, SAMPLED)) * (data.size / SAMPLED) ** 0.5
    led = Led(data.ranks, rows.rows)
    source = rows if data.ranks.world == 1 else LedRows(led, rows)
    return led.run(
        lambda: certify_expressivity(
            source, method=method, bias=head.has_bias, feature_error=error, same_inputs=data.same_inputs
        )
    )


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
