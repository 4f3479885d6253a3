"""``Conjugate``: the convex conjugates of torch's losses, with which Fenchel duality bounds their infimum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_conv.losses.per_sample import SampleLosses


class Conjugate:
    r"""Convex conjugates of the samples' losses, and their domains.

    They are :math:`\ell_i^*(\alpha) = \sup_u \alpha \cdot u - \ell_i(u)`. Each is a sum over the C
    outputs of the following terms; A below is the (n, C) matrix of all alpha.

    - squared, s |u - y|^2 (s = 1 / C, or 1 for sums): y alpha + alpha^2 / (4 s)
    - Huber: y alpha + alpha^2 / (2 s), |alpha| <= s delta; smooth L1: y alpha + beta alpha^2 / (2 s), |alpha| <= s;
      absolute: y alpha
    - cross-entropy, weights q of sum T: p log(p / T) with p = alpha + q >= 0
    - binary: s (p log p + (1 - p) log(1 - p)) with p = alpha / s + t in [0, 1]
    """

    def __init__(self, losses: SampleLosses) -> None:
        self._losses, self._all = losses, slice(0, losses.samples)
        self._kind, self._s = losses.kind, 1 / losses.outputs if losses.mean else 1.0
        self._curvature, self._bound = self._quadratic()
        if self._kind == "cross-entropy":
            self._q = losses.distributions(self._all)
            self._total = self._q.sum(1, keepdim=True)

    def _quadratic(self) -> tuple[float, float]:
        """Return (c, B) of a conjugate y alpha + c alpha^2 with |alpha| <= B."""
        module = self._losses.module
        match self._losses.loss.kind:
            case "huber":
                return 1 / (2 * self._s), self._s * module.delta
            case "smooth_l1":
                return module.beta / (2 * self._s), self._s
            case "absolute":
                return 0.0, self._s
        return 1 / (4 * self._s), math.inf

    def _probabilities(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return p and its upper bound."""
        if self._kind == "cross-entropy":
            return a + self._q, self._total
        return a / self._s + self._losses.targets, torch.ones_like(a)

    def inside(self, a: Tensor, floor: float) -> Tensor:
        """Move A into the domain, ``floor`` away from its border.

        For box domains A is scaled, which keeps Z^T A = 0.
        """
        if self._kind in ("squared", "elementwise"):
            largest = float(a.abs().max())
            return a * min(1.0, (self._bound * (1 - 1e-9) - floor) / largest) if largest > 0 else a
        p, most = self._probabilities(a)
        if self._kind == "cross-entropy":
            p = p.clamp(min=floor)
            return p * (most / p.sum(1, keepdim=True)) - self._q
        return self._s * (p.clamp(floor, 1 - floor) - self._losses.targets)

    def slack(self, a: Tensor) -> float:
        """Return the distance by which every entry of A may move without leaving the domain; negative outside of it."""
        if self._kind in ("squared", "elementwise"):
            return self._bound - float(a.abs().max())
        p, most = self._probabilities(a)
        if self._kind == "cross-entropy":
            return float(p.min()) - 1e-15 * float(most.max())
        return self._s * (min(float(p.min()), 1 - float(p.max())) - 1e-15)

    def values(self, a: Tensor) -> Tensor:
        """Return the terms of the conjugates, (n, C): their sums over each row are the conjugates."""
        if self._kind in ("squared", "elementwise"):
            return self._losses.targets * a + self._curvature * a.square()
        p, most = self._probabilities(a)
        p = p.clamp(min=0)
        if self._kind == "cross-entropy":
            found: Tensor = torch.special.xlogy(p, p / most)
            return found
        p = p.clamp(max=1)
        both: Tensor = torch.special.xlogy(p, p) + torch.special.xlog1py(1 - p, -p)
        return self._s * both

    def sizes(self, a: Tensor) -> Tensor:
        """Return the numbers, (n,), to which the rounding error of A itself is proportional."""
        if self._kind == "cross-entropy":
            return self._total[:, 0] + a.abs().sum(1)
        if self._kind == "binary":
            return (self._losses.targets.abs() * self._s + a.abs()).sum(1)
        return (self._losses.targets.abs() * a.abs()).sum(1) + a.abs().sum(1)

    def slope(self, a: Tensor, moved: float) -> float:
        """Return an upper bound of the Frobenius norm of the conjugates' gradients within ``moved`` of A."""
        if self._kind in ("squared", "elementwise"):
            return float(self._losses.targets.norm()) + 2 * self._curvature * (float(a.norm()) + moved)
        p, most = self._probabilities(a)
        shift = moved if self._kind == "cross-entropy" else moved / self._s
        near = (p - shift).clamp(min=1e-300)
        if self._kind == "cross-entropy":
            return float(((near / most).log().abs() + 1).norm())
        return float(
            (near.log() - (1 - p - shift).clamp(min=1e-300).log()).abs().norm() + (near.log().abs() + 1).norm()
        )
