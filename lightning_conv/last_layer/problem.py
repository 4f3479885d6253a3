"""``HeadProblem``: the loss of a training set as a function of the last linear layer alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.checked import checked, whole
from lightning_conv.expressivity.stream import FeatureRows
from lightning_conv.last_layer.features import HeadFeatures, feature_rows
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import gamma
from lightning_conv.losses.per_sample import Infimum, SampleLosses

VANISHING = 2.0**-900
"""Loss below which products of its formula may have vanished."""


class HeadProblem(HeadFeatures):
    r"""The convex problem of phase 2 in float64: minimise :math:`L(W) = \frac1n \sum_i \ell(W^T [h_i, 1], y_i)` over W.

    After Kawaguchi & Sun 2021, section 1.3 of their algorithm: the trunk is frozen, so the features h are constants. W,
    (m_H + 1, C), contains the layer's weight (transposed) and below it the bias; ``stack`` and ``split`` convert. With
    rank [h, 1] = n every (n, C) matrix of outputs is reachable, and inf_W L is the infimum of the loss, ``infimum``.

    Features that fit into half of ``max_memory`` are held in memory. Others are computed again in strips for every pass.

    Args:
        features: h, (n, m_H): a tensor (float32 numbers are converted exactly) or ``FeatureRows``.
        targets: y, (n, ...): one row or number per sample.
        loss_fn: see ``SampleLosses``.
        bias: whether the layer has a trained bias.
        fixed_bias: (C,), added to the outputs of a layer whose bias is not trained.
        outputs: C, if the targets do not determine it (for class numbers the default is the largest one + 1).
        infimum: infimum of L over all outputs, a number or a function of the targets, in place of the known one.
        smoothness: L_ell, in place of the known one.
        max_memory: bytes that may be used, such as ``2**30`` or ``1e9`` (default a quarter of the free memory).

    Attributes:
        losses: the ``SampleLosses``.
        held: whether the features are in memory.

    Raises:
        ValueError: the features are not a finite matrix, the number of targets is not n, or ``max_memory`` is not a finite
            number of at least one byte.
        TypeError: the features are integers.
        MemoryError: one row and its result do not fit.

    Example:
        >>> import torch
        >>> h = torch.eye(3, dtype=torch.float64)
        >>> problem = HeadProblem(h, torch.tensor([0, 1, 1]), torch.nn.CrossEntropyLoss())
        >>> round(problem.value(problem.zeros()).value, 6), problem.infimum.value
        (0.693147, 0.0)
    """

    @checked(outputs=whole(1))
    def __init__(
        self,
        features: Tensor | FeatureRows,
        targets: Tensor,
        loss_fn: object,
        *,
        bias: bool = True,
        fixed_bias: Tensor | None = None,
        outputs: int | None = None,
        infimum: Infimum | None = None,
        smoothness: float | None = None,
        max_memory: float | None = None,
    ) -> None:
        if bias and fixed_bias is not None:
            raise ValueError("fixed_bias: given, but bias=True means that the bias is trained; pass bias=False")
        rows = feature_rows(features)
        if len(targets) != rows.samples:
            raise ValueError(f"targets: {len(targets)} for {rows.samples} samples; need one row or number per sample")
        super().__init__(rows, bias=bias, max_memory=max_memory)
        self.losses = SampleLosses(
            loss_fn, targets.to(self.device), outputs=outputs, infimum=infimum, smoothness=smoothness
        )
        self.outputs_each = self.losses.outputs
        self.offset = None if fixed_bias is None else fixed_bias.detach().to(self.device, torch.float64)
        self.cut_into_strips(self.outputs_each)
        self.row_norms  # noqa: B018  computed here because the first pass also checks the features

    @property
    def infimum(self) -> Bounded | None:
        """Infimum of L if every output is reachable, (1/n) sum_i inf ell_i; None: not known."""
        return self.losses.infimum

    @property
    def smoothness(self) -> float | None:
        """Lipschitz constant L_ell of the gradient of every sample's loss by its outputs; None: none, or not known."""
        return self.losses.smoothness

    def zeros(self) -> Tensor:
        """Return W = 0, (D, C)."""
        return torch.zeros(self.columns, self.outputs_each, dtype=torch.float64, device=self.device)

    def stack(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Build W from a layer's weight (C, m_H) and bias (C,).

        Raises:
            ValueError: the shapes differ, or a bias is given or missing against ``bias``.
        """
        if tuple(weight.shape) != (self.outputs_each, self.width):
            raise ValueError(f"weight: shape {tuple(weight.shape)}; need (C, m_H) = {(self.outputs_each, self.width)}")
        if (bias is not None) != self.bias:
            raise ValueError(f"bias: {'given' if bias is not None else 'None'}, but the problem has bias={self.bias}")
        rows = [weight.detach().T] if bias is None else [weight.detach().T, bias.detach()[None]]
        return torch.cat([part.to(self.device, torch.float64) for part in rows])

    def split(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias) of the layer; this is the inverse of ``stack``."""
        return w[: self.width].T.contiguous(), w[self.width].clone() if self.bias else None

    def outputs(self, w: Tensor) -> Tensor:
        """Compute the outputs u = [h, 1] W + fixed bias, (n, C), in one pass."""
        return self._with_offset(self.product(w))

    def _with_offset(self, product: Tensor) -> Tensor:
        return product if self.offset is None else product + self.offset

    def loss_and_gradient(self, w: Tensor) -> tuple[float, Tensor]:
        """Compute L(W) and its gradient [h, 1]^T G / n, (D, C), where G holds the gradients with respect to the outputs.

        Args:
            w: last layer W, (D, C).

        Cost: one pass, 4 n D C flops.
        """
        total, gradient = 0.0, torch.zeros_like(w)
        for strip, h in self.rows():
            part, by_outputs = self.losses.gradients(self._with_offset(self.times(h, w)), strip)
            total += part
            gradient += self.transposed(h, by_outputs)
        return total / self.samples, gradient / self.samples

    def value(self, w: Tensor) -> Bounded:
        r"""Compute L(W) with bounds of its rounding error, in one pass.

        Outputs err by at most :math:`\epsilon_i = \gamma_{D+2} |[h_i, 1]| |W|_F` (Higham 2002, section 3.5;
        Cauchy-Schwarz). This changes a loss of smoothness L_ell by at most
        :math:`|\nabla \ell_i| \epsilon_i + \frac{L_\ell}2 \epsilon_i^2`. The rounding of the loss formula
        (``SampleLosses.rounding``) and gamma_n for the sum are added. The bounds are proven for torch's losses, with h and W
        taken as exact. For the caller's own loss the rounding of the formula is not known, and ``certified`` is False.

        Args:
            w: last layer W, (D, C).

        Raises:
            ValueError: W has another shape.
        """
        if tuple(w.shape) != (self.columns, self.outputs_each):
            raise ValueError(f"w: shape {tuple(w.shape)}; need (D, C) = {(self.columns, self.outputs_each)}")
        total = slack = 0.0
        size = float(w.norm()) * (1 + gamma(w.numel() + 3, torch.float64))
        known = self.losses.kind != "custom"
        for strip, h in self.rows():
            outputs = self._with_offset(self.times(h, w))
            part, gradients = self.losses.gradients(outputs, strip)
            moved = gamma(self.columns + 2, torch.float64) * self.row_norms[strip] * size
            if self.offset is not None:
                moved = moved + gamma(1, torch.float64) * (outputs.norm(dim=1) + float(self.offset.norm()))
            total += part
            slack += float(self._moved_losses(gradients, moved).sum())
            if known:
                slack += float(self.losses.rounding(outputs, self.losses.each(outputs, strip), strip).sum())
        value = total / self.samples
        if not math.isfinite(value):
            return Bounded(value, -math.inf, math.inf, certified=False, method="overflow")
        slack = 1.001 * (slack / self.samples + gamma(self.samples + 3, torch.float64) * abs(value))
        if abs(value) < VANISHING:  # products that underflow: 2^-1074 for each output, and a few more for a sample
            slack += (self.outputs_each + 16) * math.ulp(0.0)
        proven = known and (self.smoothness is not None or self.losses.lipschitz is not None)
        method = "float64, rounding bounded" if proven else "float64, rounding of the outputs only"
        return Bounded(value, value - slack, value + slack, certified=proven, method=method)

    def _moved_losses(self, gradients: Tensor, moved: Tensor) -> Tensor:
        if self.losses.lipschitz is not None:
            return self.losses.lipschitz * moved
        # The term 1e-12 covers the rounding of the gradients themselves.
        smoothness = self.smoothness or 0.0
        slopes: Tensor = 1.001 * gradients.norm(dim=1) + 1e-12 * smoothness
        return slopes * moved + smoothness / 2 * moved.square()
