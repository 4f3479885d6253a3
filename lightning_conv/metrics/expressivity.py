"""The metric of the expressivity condition, updated batch by batch: ``ExpressivityRank``."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor
from typing_extensions import override

from lightning_conv.expressivity import RankCertificate, certify_expressivity, require_features
from lightning_conv.metrics.states import Float64Metric, MetricOptions, gather_rows, to_supported_device


class ExpressivityRank(Float64Metric):
    r"""Certified rank of [h, 1], where h are the last hidden features of all samples: a proven LOWER bound of the rank.

    If it equals n, the number of samples, the last layer alone reaches every target
    (``certificate().verdict == "certified"``). ``update`` only collects features. ``forward`` returns the rank of its batch
    alone, from a singular value decomposition.

    The features of all ranks are concatenated. A ``DistributedSampler`` repeats samples until every rank has the same
    number. The repeated ones count in n but not in the rank, so rank n is then impossible. Choose a number of ranks that
    divides the number of samples.

    Args:
        bias: whether the last layer has a trainable bias; without one the matrix is h alone.
        options: options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        TypeError: from ``update`` if the features are not float64.
        ValueError: from ``update`` if the features are not a finite matrix, or differ in width from the previous ones.

    Cost: ``update`` keeps the batch, 8 n m_H bytes in total; ``compute`` takes one singular value decomposition, about
    20 n^2 m_H flops.
    Source: Kawaguchi & Sun 2021; ``certify_expressivity``.

    Example::

        def validation_step(self, batch, batch_idx):  # self.head = find_head(...)
            self.rank.update(last_hidden_features(self, self.head, batch[0], dtype=torch.float64))
            self.log("rank", self.rank)

    Example:
        >>> import torch
        >>> metric = ExpressivityRank()
        >>> for rows in torch.eye(4, 3, dtype=torch.float64).split(2):  # 3 features and the bias column
        ...     metric.update(rows)
        >>> metric.compute(), metric.certificate().verdict
        (tensor(4., dtype=torch.float64), 'certified')
    """

    full_state_update = False
    higher_is_better = True
    plot_lower_bound = 0.0
    features: list[Tensor] | Tensor  # float64, (n_b, m_H) each
    squared_error: Tensor

    def __init__(self, bias: bool = True, **options: Unpack[MetricOptions]) -> None:
        options.setdefault("dist_sync_fn", gather_rows)
        super().__init__(**options)
        self.bias = bias
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("squared_error", self._scalar(0.0), dist_reduce_fx="sum")

    @override
    def update(self, features: Tensor, feature_error: float = 0.0) -> None:
        """Collect the features of a batch.

        Args:
            features: h, float64, shape (n_b, m_H), from ``last_hidden_features(..., dtype=torch.float64)``.
            feature_error: Frobenius norm of the change that rounding inside the trunk may have made to them, for instance
                ``feature_rounding(h_32, features)``; the squares of all batches are summed. With zero the certificate is
                about the features as given.

        Raises:
            TypeError: the features are not float64.
            ValueError: the features are empty, not a matrix, not finite or of another width than the previous batches, or
                the error is negative.
        """
        features = features.detach()
        require_features(features)
        if features.dtype != torch.float64:
            raise TypeError(
                f"features: {features.dtype}; a rank needs float64 features from a float64 copy of the trunk, because rounding "
                "fills every direction of float32 ones: use last_hidden_features(..., dtype=torch.float64)"
            )
        if len(self.features) and features.shape[1] != self.features[0].shape[-1]:
            raise ValueError(
                f"features: {features.shape[1]} per sample after batches of {self.features[0].shape[-1]}; pass those of one "
                "last hidden layer, or call reset() first"
            )
        if not 0 <= feature_error < float("inf"):
            raise ValueError(f"feature_error: {feature_error}; need a norm, zero or more")
        assert isinstance(self.features, list)
        self.features.append(to_supported_device(features, self.device))
        self.squared_error = self.squared_error + feature_error**2

    @override
    def compute(self) -> Tensor:
        """Compute the certified lower bound of the rank of [h, 1]; NaN before the first update."""
        self._found = None
        if not len(self.features):
            return self._scalar(float("nan"))
        rows = self.features if isinstance(self.features, Tensor) else torch.cat(self.features)
        error = float(self.squared_error) ** 0.5
        self._found = certify_expressivity(rows, bias=self.bias, feature_error=error)
        return self._scalar(float(self._found.rank_lower))

    def certificate(self) -> RankCertificate:
        """Return the certificate: the verdict, sigma_min with its bounds, and the reason.

        Like ``compute``, this is a collective operation, and it is equally expensive unless the result is cached.

        Raises:
            ValueError: there are no features yet.
        """
        certificate: RankCertificate = self._details("features")
        return certificate
