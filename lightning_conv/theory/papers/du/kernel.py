r"""Criteria of the proofs about the kernel during training: lambda_min, drift from the start, distance from the limit.

"Deep" is Du, Lee, Li, Wang, Zhai 2019 (1811.03804), "two layers" is Du, Zhai, Poczos, Singh 2019 (1810.02054).

Notation: G(k) is the kernel after k steps (H(k) for two layers, G^(H)(k) for H layers), K its limit for infinite width
(H_inf, or K^(H)), lambda_0 = lambda_min(K) on the training set, and r_k = u(k) - y. The argument of both papers is

.. math::
    |G(0) - K|_2 \le \lambda_0 / 4 \;\text{ and }\; |G(k) - G(0)|_2 \le \lambda_0 / 4 \quad\Rightarrow\quad
    \lambda_{\min}(G(k)) \ge \lambda_0 / 2 \quad\Rightarrow\quad |r_{k+1}|^2 \le (1 - \eta \lambda_0 / 2) |r_k|^2.

**Origin of 1/2 and 2/3.** The first inequality (Lemma 3.1 of the two-layer paper, Lemma B.2 of the deep one) and
Weyl's inequality give lambda_min(G(0)) >= 3/4 lambda_0. The second one (Lemma 3.2 and Lemma B.4) takes away another
quarter, which leaves lambda_min(G(k)) >= 1/2 lambda_0. So the condition is **1/2 of the limit's lambda_0**. Where no
limit is known, the kernel's own start takes its place: with lambda_0 <= 4/3 lambda_min(G(0)), the drift may be
lambda_0 / 4, that is 1/3 lambda_min(G(0)), and what remains is **2/3 of the first lambda_min**:
(1/2 lambda_0) / (3/4 lambda_0) = 2/3. The one half refers to the limit, not to the first kernel.

Each inequality is measured by itself, as a share of lambda_0, and the verdict includes both errors of measurement. An
inequality that is true at the steps where it was measured is ``consistent`` and never more, because the widths of the
theorems have unspecified constants.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_conv.kernels.drift import frobenius_floor, require_comparable
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.eigenvalues.bounded import Bounded, quotient
from lightning_conv.theory.criterion import Criterion, at_least, at_most

DEEP = "Du, Lee, Li, Wang, Zhai 2019"
TWO_LAYER = "Du, Zhai, Poczos, Singh 2019"
DURING_TRAINING = f"{DEEP}, Lemma B.4; {TWO_LAYER}, Lemma 3.2"


def lambda_min_criterion(gram: KernelGram | Tensor, lambda_0: Bounded) -> Criterion:
    """Judge lambda_min(G(k)) / lambda_0 >= 1/2, the condition from which the rate follows.

    Args:
        gram: H(k) or G^(H)(k) on the samples of lambda_0. The kernel over all layers is a sum of positive semidefinite
            ones and therefore larger, which makes the inequality easier to satisfy.
        lambda_0: lambda_min of the limit kernel.

    Source: two layers, Lemma 3.2; deep, Lemma B.4 (lambda_min >= lambda_0 / 2).
    """
    share = quotient(kernel_spectrum(gram, method="auto").lambda_min, lambda_0)
    return at_least("lambda_min_share", DURING_TRAINING, "lambda_min(G(k)) / lambda_0 >= 1/2", share, 0.5)


def drift_criterion(gram: KernelGram | Tensor, initial: KernelGram | Tensor, lambda_0: Bounded) -> Criterion:
    """Judge the drift, |G(k) - G(0)|_2 / lambda_0 <= 1/4.

    Args:
        gram: The kernel after k steps.
        initial: The kernel at the start, on the same samples.
        lambda_0: lambda_min of the limit kernel; where no limit is known, 4/3 lambda_min(G(0)).

    Raises:
        ValueError: The two kernels cannot be compared.

    Source: deep, Lemma B.4; two layers, Lemma 3.2.
    """
    require_comparable(gram, initial)
    share = quotient(_distance(gram, initial), lambda_0)
    return at_most("kernel_drift", DURING_TRAINING, "|G(k) - G(0)|_2 / lambda_0 <= 1/4", share, 0.25)


def initial_criterion(initial: KernelGram | Tensor, limit: LimitKernel | Tensor) -> Criterion:
    """Judge |G(0) - K|_2 / lambda_0 <= 1/4: the network is so wide that its kernel starts near the limit.

    Args:
        initial: H(0) or G^(H)(0).
        limit: K^(H), or H_inf as a matrix.

    Raises:
        ValueError: The shapes differ.

    Source: deep, Lemma B.2; two layers, Lemma 3.1.
    """
    matrix, error = (limit.matrix, limit.error) if isinstance(limit, LimitKernel) else (limit, 0.0)
    lambda_0 = limit.lambda_0 if isinstance(limit, LimitKernel) else kernel_spectrum(limit, method="auto").lambda_min
    require_comparable(initial, matrix)
    distance = _distance(initial, matrix)
    distance = replace(distance, lower=max(distance.lower - error, 0.0), upper=distance.upper + error)
    share, source = quotient(distance, lambda_0), f"{DEEP}, Lemma B.2; {TWO_LAYER}, Lemma 3.1"
    return at_most("limit_distance", source, "|G(0) - K|_2 / lambda_0 <= 1/4", share, 0.25)


def own_lambda_min_criterion(gram: KernelGram | Tensor, initial: KernelGram | Tensor) -> Criterion:
    """Judge lambda_min(G(k)) / lambda_min(G(0)) >= 2/3: the same argument for a network whose limit is not known.

    The module docstring derives the 2/3.

    Args:
        gram: The kernel after k steps, of any module (``ntk_gram``).
        initial: The kernel at the start, on the same samples.

    Raises:
        ValueError: The two kernels cannot be compared.

    Source: after Lemmas B.2 and B.4 of the deep paper. For networks other than those of the paper it is an analogy, not
    a theorem.
    """
    require_comparable(gram, initial)
    now, then = (kernel_spectrum(each, method="auto").lambda_min for each in (gram, initial))
    return lambda_min_share_criterion(quotient(now, then))


def lambda_min_share_criterion(share: Bounded) -> Criterion:
    """Judge ``own_lambda_min_criterion`` from a quotient that is already computed.

    Args:
        share: lambda_min(G(k)) / lambda_min(G(0)).
    """
    source = f"after {DEEP}, Lemmas B.2 and B.4"
    return at_least("own_lambda_min_share", source, "lambda_min(G(k)) / lambda_min(G(0)) >= 2/3", share, 2 / 3)


def _distance(gram: KernelGram | Tensor, reference: KernelGram | Tensor) -> Bounded:
    """Compute |G - R|_2 with the error of the eigenvalue problem and the rounding of both kernels."""
    now, then = (each.matrix if isinstance(each, KernelGram) else each for each in (gram, reference))
    spectrum = kernel_spectrum(now - then.to(now.device), method="auto")
    ends = (spectrum.lambda_min, spectrum.lambda_max)
    rounding = frobenius_floor(gram) + frobenius_floor(reference)
    value = max(-ends[0].value, ends[1].value)
    lower = max(-ends[0].upper, ends[1].lower, 0.0) - rounding
    upper = max(-ends[0].lower, ends[1].upper) + rounding
    return Bounded(value, max(lower, 0.0), upper, certified=False, method=f"{ends[0].method} + rounding of the kernels")
