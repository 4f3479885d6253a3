"""``SampleLosses``: the loss of each sample as a convex function of its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_conv.arguments import described, require_callable
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import gamma, unit_roundoff
from lightning_conv.losses.facts import binary_entropy, target_distributions
from lightning_conv.losses.kind import loss_kind

Kind: TypeAlias = Literal["squared", "elementwise", "cross-entropy", "binary", "custom"]
Infimum: TypeAlias = float | Callable[[Tensor], Tensor]

FORMULAS: dict[str, Kind] = {
    "squared": "squared",
    "huber": "elementwise",
    "smooth_l1": "elementwise",
    "absolute": "elementwise",
    "cross_entropy": "cross-entropy",
    "binary_cross_entropy": "binary",
}
"""The formula by ``LossKind.kind``; a loss that is not among them is ``"custom"``."""

U = unit_roundoff(torch.float64)


def require_loss(loss_fn: object) -> None:
    """Refuse what is no loss.

    Args:
        loss_fn: the argument of this name.

    Raises:
        TypeError: it cannot be called, or is the class of a loss in place of a loss.
    """
    if isinstance(loss_fn, type):
        raise TypeError(f"loss_fn: {described(loss_fn)}; need a loss of it, such as {loss_fn.__name__}()")
    require_callable("loss_fn", loss_fn, "nn.CrossEntropyLoss() or a function of (outputs, targets)")


class SampleLosses:
    r"""Losses :math:`\ell_i` of n samples, :math:`L = \frac1n \sum_i \ell_i(u_i)`, in float64.

    The formulas of torch's losses are known (``loss_facts``): squared, Huber, smooth L1 and absolute error (a mean over
    the C outputs of a sample), cross-entropy with class numbers or distributions, smoothed or weighted, and binary
    cross-entropy of logits. Any other ``loss_fn(outputs, targets)`` must be convex in the outputs, which is not
    checked, and return the mean over samples or one number per sample. ``reduction="sum"`` is taken as n L.

    Args:
        loss_fn: a loss module, or any function of (outputs, targets).
        targets: y, one row or number per sample.
        outputs: C; None: the number of columns of the targets, for class numbers the largest one + 1.
        infimum: infimum of L over all outputs: a number, or a function of the targets that returns one per sample (or
            their mean). None: the result of ``loss_facts``.
        smoothness: L_ell, the Lipschitz constant of every gradient of :math:`\ell_i`; None: the result of ``loss_facts``.

    Attributes:
        loss: kind of ``loss_fn``, a ``LossKind``.
        kind: the formula; ``"custom"``: not one of torch's.
        infimum: (1/n) sum_i inf ell_i with the rounding error of its sum; None: not known.
        smoothness: L_ell; None: unbounded or not known.
        attained: whether some outputs attain the infimum; None: not known.
        module: the loss in float64; one of torch's has ``reduction="none"``.
        mean: whether a sample's loss is a mean over its outputs (``reduction="sum"``: a sum).

    Raises:
        TypeError: see ``require_loss``.
        ValueError: there are no targets, NaN is among them, class numbers are outside 0, ..., C - 1, or
            ``ignore_index`` leaves samples out.
    """

    def __init__(
        self,
        loss_fn: object,
        targets: Tensor,
        *,
        outputs: int | None = None,
        infimum: Infimum | None = None,
        smoothness: float | None = None,
    ) -> None:
        require_loss(loss_fn)
        if targets.ndim == 0 or len(targets) == 0:
            raise ValueError(f"targets: shape {tuple(targets.shape)}; need one row or number per sample")
        self.samples = len(targets)
        self.loss = loss_kind(loss_fn)
        self.kind: Kind = FORMULAS.get(self.loss.kind, "custom") if self.loss.factor == 1 else "custom"
        self.targets = targets.detach()
        if self.kind in ("squared", "elementwise", "binary"):
            self.targets = self.targets.reshape(self.samples, -1)
        if self.targets.is_floating_point() or self.kind in ("squared", "elementwise", "binary"):
            self.targets = self.targets.double()
            if not bool(torch.isfinite(self.targets).all()):
                raise ValueError("targets: NaN or infinity; clean the data")
        self.outputs = self._count(outputs)
        self._require_classes()
        self.module = self.loss.like(torch.empty(0, dtype=torch.float64, device=self.targets.device))
        self.mean = not self.loss.summed
        facts = self.loss.facts(torch.empty(1, 1).expand(self.samples, self.outputs), self.targets)
        if facts is None:
            self.kind = "custom"
        elif self.kind != "custom":
            self.module.reduction = "none"
        self.smoothness = facts.smoothness if smoothness is None and facts is not None else smoothness
        self.attained = None if facts is None or infimum is not None else facts.attained
        self.infimum = self._bounded_infimum(infimum, None if facts is None else facts.infimum)
        self.scale = self._scale()

    def _count(self, outputs: int | None) -> int:
        hard = self.kind == "cross-entropy" and not self.targets.is_floating_point()
        if self.targets.ndim > 1:
            found = self.targets[0].numel()
            if outputs is not None and outputs != found and self.kind != "custom":
                raise ValueError(
                    f"outputs: {outputs}, but the targets have {found} numbers per sample; they must agree"
                )
            return found if outputs is None else outputs
        if outputs is None:
            outputs = int(self.targets.max()) + 1 if not self.targets.is_floating_point() else 1
        if outputs < 1 or (hard and outputs < 2):
            raise ValueError(f"outputs: {outputs}; need at least one, or two for cross-entropy; pass outputs=C")
        return outputs

    def _require_classes(self) -> None:
        if self.kind != "cross-entropy":
            return
        if self.targets.is_floating_point():
            if bool((self.targets < 0).any()):
                raise ValueError("targets: negative probabilities, for which cross-entropy is not convex")
            return
        ignore_index = self.loss.loss_fn.ignore_index
        ignored = self.targets == ignore_index
        if bool(ignored.any()):
            raise ValueError(
                f"targets: {int(ignored.sum())} samples have the class {ignore_index} that ignore_index leaves out; leave these "
                "samples out"
            )
        smallest, largest = int(self.targets.min()), int(self.targets.max())
        if smallest < 0 or largest >= self.outputs:
            raise ValueError(f"targets: classes {smallest} to {largest} for {self.outputs} outputs; pass outputs=C")

    def _bounded_infimum(self, given: Infimum | None, known: float | None) -> Bounded | None:
        if given is not None:
            value = float(given(self.targets).double().mean()) if callable(given) else float(given)
            return Bounded(value, value, value, certified=False, method="the caller's number")
        if known is None:
            return None
        if known == 0:
            return Bounded(
                0.0, 0.0, 0.0, certified=True, method="the loss is never below 0 and comes as close as one likes"
            )
        # An entropy: sums of nonnegative terms, each good to a few units, of distributions that were rounded too.
        terms = self.samples * (self.outputs if self.kind == "binary" else 1) + 4 * self.outputs + 64
        slack = gamma(terms, torch.float64) * (known + 2) * max(1.0, float(self.targets.abs().max()))
        return Bounded(
            known, max(known - slack, 0.0), known + slack, certified=True, method="mean entropy of the targets"
        )

    def _scale(self) -> float:
        """Return the factor of each sample's loss: class weights count relative to their mean, as in torch."""
        if self.kind != "cross-entropy" or not self.loss.weighted or not self.loss.averaged:
            return 1.0
        return float(1 / self.module.weight[self.targets].mean())

    def each(self, outputs: Tensor, rows: slice) -> Tensor:
        """Return ell_i(u_i) of some samples, (m,). Not for ``"custom"``.

        Args:
            outputs: u, (m, C), float64.
            rows: slice of these samples.
        """
        found: Tensor = self.module(outputs, self.targets[rows])
        if self.kind == "cross-entropy":
            return found * self.scale
        return found.mean(1) if self.mean else found.sum(1)

    def total(self, outputs: Tensor, rows: slice) -> Tensor:
        """Return sum_i ell_i(u_i) over some samples as a tensor that can be differentiated.

        Raises:
            ValueError: a custom loss returns neither one number nor one per sample.
        """
        if self.kind != "custom":
            return self.each(outputs, rows).sum()
        found: Tensor = self.module(outputs, self.targets[rows])
        if found.ndim == 0:
            return found * len(outputs) if self.mean else found
        if len(found) != len(outputs):
            raise ValueError(
                f"loss_fn: returned shape {tuple(found.shape)} for {len(outputs)} samples; need one number, or one per sample"
            )
        return found.reshape(len(outputs), -1).mean(1).sum()

    def gradients(self, outputs: Tensor, rows: slice) -> tuple[float, Tensor]:
        """Return sum_i ell_i(u_i) and the gradients of ell_i with respect to u_i, (m, C)."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            total = self.total(leaf, rows)
            (gradient,) = torch.autograd.grad(total, leaf)
        return float(total.detach()), gradient

    def rounding(self, outputs: Tensor, values: Tensor, rows: slice) -> Tensor:
        r"""Return bounds (m,) of the rounding error of ell_i in float64 at exactly these outputs.

        With the unit roundoff u:

        - squared, Huber, ...: every term is nonnegative and accurate to a few u, so the relative error of the sum is at
          most gamma_{C+10}
        - cross-entropy: the error of an entry of log-softmax is at most u (2 C + 32 + 8 max|u_i|), whatever the order
          in which maximum, sum and logarithm are subtracted, times the total weight of the sample; then comes a sum of
          C nonnegative terms
        - binary: the error of an entry is at most u (24 + 8 max|u_i|)

        It is assumed that exp and log are accurate to 4 units in the last place.
        """
        relative = gamma(self.outputs + 10, torch.float64) * values
        largest = outputs.abs().amax(1)
        if self.kind == "binary":
            return relative + U * (24 + 8 * largest) * (1 if self.mean else self.outputs)
        if self.kind == "cross-entropy":
            return relative + self.weights(rows) * U * (2 * self.outputs + 32 + 8 * largest)
        return relative

    def weights(self, rows: slice) -> Tensor:
        """Return each sample's total weight in a cross-entropy, (m,): 1 without class weights and soft targets."""
        targets = self.targets[rows]
        weight = getattr(self.module, "weight", None)
        if targets.is_floating_point():
            return targets.sum(1)
        if weight is not None:
            chosen: Tensor = weight[targets]
            return chosen * self.scale
        return torch.ones(len(targets), dtype=torch.float64, device=targets.device)

    def distributions(self, rows: slice) -> Tensor:
        """Return q, (m, C), of a cross-entropy ell_i = -sum_c q_ic log softmax(u_i)_c: smoothed and weighted."""
        targets = self.targets[rows]
        q = target_distributions(self.module, targets, self.outputs)
        return q if targets.is_floating_point() else q * self.weights(rows)[:, None]

    def infima(self, rows: slice) -> Tensor:
        """Return inf ell_i, (m,), of one of torch's losses: 0, or the entropy of targets that are distributions."""
        targets = self.targets[rows]
        if self.kind == "cross-entropy":
            q = self.distributions(rows)
            total = q.sum(1)
            found: Tensor = torch.special.xlogy(total, total) - torch.special.xlogy(q, q).sum(1)
            return found.clamp(min=0)
        if self.kind == "binary":
            entropy = binary_entropy(targets)
            return entropy.mean(1) if self.mean else entropy.sum(1)
        return torch.zeros(len(targets), dtype=torch.float64, device=targets.device)

    @property
    def lipschitz(self) -> float | None:
        """Lipschitz constant of ell_i itself for the absolute error, which has no L_ell; None for other losses."""
        absolute = self.loss.kind == "absolute" or (self.loss.kind == "smooth_l1" and self.module.beta == 0)
        if not absolute:
            return None
        return math.sqrt(1 / self.outputs if self.mean else self.outputs)
