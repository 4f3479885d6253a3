"""The expressivity condition: proofs that the last hidden features let the last layer reach every target."""

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = [
    "ClosestRows",
    "Cost",
    "FeatureRows",
    "HeldRows",
    "Method",
    "RankCertificate",
    "RankVerdict",
    "StreamPlan",
    "certify_expressivity",
    "closest_rows",
    "plan_stream",
    "require_features",
    "too_narrow",
]

if TYPE_CHECKING:
    from lightning_conv.expressivity.certificate import Cost, RankCertificate, RankVerdict, require_features, too_narrow
    from lightning_conv.expressivity.certify import Method, certify_expressivity
    from lightning_conv.expressivity.closest import ClosestRows, closest_rows
    from lightning_conv.expressivity.plan import StreamPlan, plan_stream
    from lightning_conv.expressivity.stream import FeatureRows, HeldRows
else:
    __getattr__, __dir__ = lazy(__name__)
