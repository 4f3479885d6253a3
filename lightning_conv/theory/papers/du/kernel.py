r"""What the proofs ask of the kernel during training: its lambda_min, its drift, its distance from the limit.

lambda_0 = lambda_min of the limit kernel (H_inf, or K^(H)) on the training set. The chain of both papers is

.. math::
    |G(0) - K|_2 \le \lambda_0 / 4 \;\text{ and }\; |G(k) - G(0)|_2 \le \lambda_0 / 4 \quad\Rightarrow\quad
    \lambda_{\min}(G(k)) \ge \lambda_0 / 2 \quad\Rightarrow\quad |r_{k+1}|^2 \le (1 - \eta \lambda_0 / 2) |r_k|^2.

Each part is measured by itself, as a share of lambda_0; both errors of measurement are in the verdict. That an inequality holds at the
steps where it was measured is ``consistent``, never more: the theorems' widths have unspecified constants.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_conv.kernels.drift import frobenius_floor, require_comparable
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.linalg.eigenvalues.bounded import Bounded, quotient
from lightning_conv.linalg.spectrum import kernel_spectrum
from lightning_conv.theory.criterion import Criterion, at_least, at_most

DEEP = "Du, Lee, Li, Wang, Zhai 2019"
TWO_LAYER = "Du, Zhai, Poczos, Singh 2019"


def lambda_min_criterion(gram: KernelGram | Tensor, lambda_0: Bounded) -> Criterion:
    """lambda_min(G(k)) / lambda_0 >= 1/2: THE condition, from which the rate follows.

    Args:
        gram: H(t) or G^(H)(k) on the samples that lambda_0 is of. The kernel over all layers is larger (a sum of positive
            semidefinite ones), so for it the inequality is easier.
        lambda_0: of the limit kernel.

    Source: two layers, Lemma 3.2; deep, Lemma B.4 (lambda_min >= lambda_0 / 2).
    """
    share = quotient(kernel_spectrum(gram, method="auto").lambda_min, lambda_0)
    return at_least(
        "lambda_min_share",
        f"{DEEP}, Lemma B.4; {TWO_LAYER}, Lemma 3.2",
        "lambda_min(G(k)) / lambda_0 >= 1/2",
        share,
        0.5,
    )


def drift_criterion(gram: KernelGram | Tensor, initial: KernelGram | Tensor, lambda_0: Bounded) -> Criterion:
    """|G(k) - G(0)|_2 / lambda_0 <= 1/4.

    Args:
        gram: now.
        initial: at the start, on the same samples.
        lambda_0: of the limit kernel; for a network without one, 4/3 lambda_min(G(0)).

    Raises:
        ValueError: the two kernels do not compare.

    Source: deep, Lemma B.4; two layers, Lemma 3.2.
    """
    require_comparable(gram, initial)
    share = quotient(_distance(gram, initial), lambda_0)
    return at_most(
        "kernel_drift", f"{DEEP}, Lemma B.4; {TWO_LAYER}, Lemma 3.2", "|G(k) - G(0)|_2 / lambda_0 <= 1/4", share, 0.25
    )


def initial_criterion(initial: KernelGram | Tensor, limit: LimitKernel | Tensor) -> Criterion:
    """|G(0) - K|_2 / lambda_0 <= 1/4: the network is wide enough for its kernel to be near the limit, at this draw.

    Args:
        initial: H(0) or G^(H)(0).
        limit: K^(H), or H_inf as a matrix.

    Raises:
        ValueError: the shapes differ.

    Source: deep, Lemma B.2; two layers, Lemma 3.1.
    """
    matrix, error = (limit.matrix, limit.error) if isinstance(limit, LimitKernel) else (limit, 0.0)
    lambda_0 = limit.lambda_0 if isinstance(limit, LimitKernel) else kernel_spectrum(limit, method="auto").lambda_min
    require_comparable(initial, matrix)
    distance = _distance(initial, matrix)
    distance = replace(distance, lower=max(distance.lower - error, 0.0), upper=distance.upper + error)
    return at_most(
        "limit_distance",
        f"{DEEP}, Lemma B.2; {TWO_LAYER}, Lemma 3.1",
        "|G(0) - K|_2 / lambda_0 <= 1/4",
        quotient(distance, lambda_0),
        0.25,
    )


def own_lambda_min_criterion(gram: KernelGram | Tensor, initial: KernelGram | Tensor) -> Criterion:
    """lambda_min(G(k)) / lambda_min(G(0)) >= 2/3: the same chain for any network, whose limit is not at hand.

    The proofs go from lambda_min(G(0)) >= 3/4 lambda_0 to lambda_min(G(k)) >= 1/2 lambda_0, so the kernel keeps two thirds of its
    own lambda_min.

    Args:
        gram: now, of any module (``ntk_gram``).
        initial: at the start.

    Raises:
        ValueError: the two kernels do not compare.

    Source: after the deep paper's Lemmas B.2 and B.4. For networks other than theirs it is an analogy, no theorem.
    """
    require_comparable(gram, initial)
    now, then = (kernel_spectrum(each, method="auto").lambda_min for each in (gram, initial))
    return lambda_min_share_criterion(quotient(now, then))


def lambda_min_share_criterion(share: Bounded) -> Criterion:
    """``own_lambda_min_criterion`` where the quotient is at hand.

    Args:
        share: lambda_min(G(k)) / lambda_min(G(0)).
    """
    source = f"after {DEEP}, Lemmas B.2 and B.4"
    return at_least("own_lambda_min_share", source, "lambda_min(G(k)) / lambda_min(G(0)) >= 2/3", share, 2 / 3)


def _distance(gram: KernelGram | Tensor, reference: KernelGram | Tensor) -> Bounded:
    """|G - R|_2 with the eigenvalue problem's error and both kernels' rounding."""
    now, then = (each.matrix if isinstance(each, KernelGram) else each for each in (gram, reference))
    spectrum = kernel_spectrum(now - then.to(now.device), method="auto")
    ends = (spectrum.lambda_min, spectrum.lambda_max)
    rounding = frobenius_floor(gram) + frobenius_floor(reference)
    value = max(-ends[0].value, ends[1].value)
    lower = max(-ends[0].upper, ends[1].lower, 0.0) - rounding
    upper = max(-ends[0].lower, ends[1].upper) + rounding
    return Bounded(value, max(lower, 0.0), upper, certified=False, method=f"{ends[0].method} + rounding of the kernels")
