r"""``subset_bound``: what the kernel over some of the parameters says of the smallest eigenvalue of the whole kernel.

Source: Horn & Johnson, Matrix Analysis, 2nd ed., Corollary 4.3.12 (monotonicity), Theorem 4.3.1 (Weyl) and Theorem 4.3.17 (interlacing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_conv.arguments import require_truth, require_type
from lightning_conv.kernels.planning.request import KernelOutputs
from lightning_conv.kernels.result import KernelGram
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import sum_down

BY_SPECTRUM = 'lambda_min with its bounds, kernel_spectrum(ntk_gram(model, inputs, precision="certified")).lambda_min'
"""How a bound is made."""


@dataclass(frozen=True, kw_only=True)
class SubsetBound:
    """Bounds of lambda_min of the whole kernel, of the probe and of the training set apart.

    Attributes:
        probe: lambda_min of the kernel over all parameters, on the samples of the subset kernels. Its value is the lower end.
        training_set: The same on all training samples.
        parameters: Those that the bound rests on.
        samples: Number of samples of the subset kernels.
        on_training_set: Whether these are all training samples.
        outputs: Which kernel it is.
        n_outputs: Number of outputs of a sample.
    """

    probe: Bounded
    training_set: Bounded
    parameters: tuple[str, ...]
    samples: int
    on_training_set: bool
    outputs: KernelOutputs = "trace"
    n_outputs: int = 1


def subset_bound(
    kernels: Sequence[KernelGram],
    smallest: Sequence[Bounded],
    *,
    on_training_set: bool = False,
    whole: Bounded | None = None,
) -> SubsetBound:
    r"""Bound lambda_min of the whole kernel from below by kernels over disjoint subsets of the parameters.

    .. math:: \lambda_{\min}(K) \ge \sum_S \lambda_{\min}(K_S)

    Proof. J consists of one block of columns per parameter, so :math:`K = J J^T = \sum_p J_p J_p^T`. With disjoint subsets S and R the
    remaining parameters, :math:`K = \sum_S K_S + K_R`, and :math:`K_R = J_R J_R^T` is positive semidefinite. For each unit vector v,
    :math:`v^T K v \ge \sum_S v^T K_S v \ge \sum_S \lambda_{\min}(K_S)`; take the minimum over v. All kernels must be on the same samples,
    outputs and weights; that the samples and the weights are the same is left to the caller.

    On the training set: let the probe be a part of it. K of the probe is a principal submatrix of K of the training set, so

    .. math:: 0 \le \lambda_{\min}(K_{\mathrm{set}}) \le \lambda_{\min}(K_{\mathrm{probe}})

    by interlacing. A lower bound for the probe therefore says nothing of the training set, unless the two are the same samples. An
    upper end for the whole kernel of the probe is one for the training set, too; that of a subset is not, since it may lie below it.

    Args:
        kernels: The kernels over the subsets, each on all samples of the probe.
        smallest: lambda_min of each, as ``kernel_spectrum`` bounds it.
        on_training_set: Whether these samples are all training samples, as the network sees them.
        whole: lambda_min of the whole kernel on the same samples, for the upper end: a number above it is enough, such as the smallest
            diagonal entry with its error. It is used only if it is certified. None: there is no upper end.

    Returns:
        The bounds, ``certified`` where the bounds of all subsets are and something is said.

    Raises:
        TypeError: A kernel is no ``KernelGram``, a bound or ``whole`` no ``Bounded``, ``on_training_set`` no truth value.
        ValueError: There is no kernel, or another number of bounds; subsets overlap; samples, outputs or BatchNorm modes differ; a kernel
            is between two sets of samples or estimated by projections; outputs of several kernels are contracted by vectors that
            need not agree; the upper end is below the lower one, so the two are not of the same kernel.

    Cost: none beside that of the kernels.
    """
    require_whole_kernel(whole)
    require_truth("on_training_set", on_training_set)
    for name, given, kind in (("kernels", kernels, KernelGram), ("smallest", smallest, Bounded)):
        require_type(name, given, Sequence, f"a list of {kind.__name__}")
        for each in given:
            require_type(name, each, kind, BY_SPECTRUM if kind is Bounded else "what ntk_gram returns")
    if not kernels or len(kernels) != len(smallest):
        raise ValueError(f"kernels: {len(kernels)} with {len(smallest)} bounds; need at least one, each with its bound")
    first = kernels[0]
    names = [name for kernel in kernels for name in kernel.parameters]
    _require_disjoint(names)
    for kernel in kernels:
        _require_alike(kernel, first, alone=len(kernels) == 1)
    lower = sum_down(*(max(each.lower, 0.0) for each in smallest))
    upper = whole.upper if whole is not None and whole.certified else math.inf
    if upper < lower:
        raise ValueError(f"whole: at most {upper:.6g}, below the lower bound {lower:.6g}; it is of another kernel")
    certified = all(each.certified for each in smallest)
    method = "sum of positive semidefinite kernels"
    probe = Bounded(lower, lower, upper, certified, method)
    if not on_training_set:
        why = f"a kernel on {first.n_samples} of the samples bounds lambda_min on all of them from above only"
        training_set = Bounded(math.nan, 0.0, upper, upper < math.inf, "interlacing", why)
    return SubsetBound(
        probe=probe,
        training_set=probe if on_training_set else training_set,
        parameters=tuple(names),
        samples=first.n_samples,
        on_training_set=on_training_set,
        outputs=first.outputs,
        n_outputs=first.n_outputs,
    )


def require_whole_kernel(whole: object) -> None:
    """Refuse what is no lambda_min of the whole kernel.

    Args:
        whole: The argument of this name.

    Raises:
        TypeError: It is neither a ``Bounded`` nor None.
    """
    if whole is not None:
        require_type("whole", whole, Bounded, f"{BY_SPECTRUM}, or None")


def _require_disjoint(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"kernels: {', '.join(twice)} in more than one of them; need disjoint subsets of the parameters"
        )


def _require_alike(kernel: KernelGram, first: KernelGram, *, alone: bool) -> None:
    if kernel.n_samples2 is not None or kernel.outputs == "projected":
        raise ValueError(
            "kernels: one is between two sets of samples, or estimated by projections; need ntk_gram of one set"
        )
    if kernel.outputs == "cotangents" and not alone:
        raise ValueError("kernels: their outputs are contracted by vectors that need not be the same; pass one kernel")
    for name in ("n_samples", "n_outputs", "outputs", "batch_norm"):
        here, there = getattr(kernel, name), getattr(first, name)
        if here != there:
            raise ValueError(f"kernels: {name}={here!r} against {there!r}; all must be on the same samples and outputs")
