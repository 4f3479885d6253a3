"""The project's numbers as ``torchmetrics.Metric``s, for logging by hand.

Each is a thin shell: ``update`` takes what the pure functions return (a kernel of ``ntk_gram``, features of
``last_hidden_features``), ``compute`` gives one float64 scalar that ``self.log`` takes. They do not take a model: its
kernel is computed once by ``ntk_gram``, with its options, and serves all metrics of a ``MetricCollection``.

What is not known gives no number: before the first ``update``, ``compute`` is NaN with torchmetrics' warning.
"""

from lightning_conv.metrics.drift import KernelAlignment, KernelDrift
from lightning_conv.metrics.expressivity import ExpressivityRank
from lightning_conv.metrics.spectrum import EffectiveRank, MinEigenvalue

__all__ = ["EffectiveRank", "ExpressivityRank", "KernelAlignment", "KernelDrift", "MinEigenvalue"]
