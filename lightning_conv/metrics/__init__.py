"""The project's numbers as ``torchmetrics.Metric``s, for manual logging.

Each metric is a thin shell. ``update`` takes what the pure functions return: a kernel of ``ntk_gram`` or features of
``last_hidden_features``. ``compute`` returns one float64 scalar for ``self.log``. The metrics do not take a model, because
its kernel is computed once by ``ntk_gram``, with its options, and serves all metrics of a ``MetricCollection``.

Before the first ``update``, ``compute`` returns NaN with torchmetrics' warning.
"""

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = ["EffectiveRank", "ExpressivityRank", "KernelAlignment", "KernelDrift", "MinEigenvalue"]

if TYPE_CHECKING:
    from lightning_conv.metrics.drift import KernelAlignment, KernelDrift
    from lightning_conv.metrics.expressivity import ExpressivityRank
    from lightning_conv.metrics.spectrum import EffectiveRank, MinEigenvalue
else:
    __getattr__, __dir__ = lazy(__name__)
