"""The distance of a kernel from a reference: ``kernel_drift``, ``relative_frobenius_change``, ``centred_alignment``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.checked import checked
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.eigenvalues.bounded import divide, quotient
from lightning_conv.linalg.rounding import exponent_of, frobenius, ldexp
from lightning_conv.linalg.spectrum import Bounded, Spectrum, require_symmetric


@dataclass(frozen=True)
class Drift:
    """Change of a Gram matrix G against a reference G_0."""

    relative_frobenius: float  # |G - G_0|_F / |G_0|_F
    relative_spectral: float  # |G - G_0|_2 / |G_0|_2
    spectral_over_lambda_min: float  # |G - G_0|_2 / lambda_min(G_0); Du et al. ask for at most 1/3
    alignment: float  # centred kernel alignment (CKA), 1: equal up to scale after centring
    lambda_min_ratio: Bounded  # lambda_min(G) / lambda_min(G_0)
    floor: float  # relative Frobenius changes below this are rounding


@checked()
def centred_alignment(x: Tensor, y: Tensor) -> float:
    r"""Return the centred kernel alignment (CKA) of two kernel matrices.

    .. math:: \frac{\langle H x H, H y H \rangle_F}{\|H x H\|_F \|H y H\|_F}, \qquad H = I - 11^T / N

    It is NaN where a centred matrix is zero, since alignment is not defined then. Source: Cortes, Mohri, Rostamizadeh
    2012, Definition 4.

    Raises:
        ValueError: a matrix has NaN or infinite entries.
    """
    for name, matrix in (("x", x), ("y", y)):
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"{name}: contains NaN or infinity; check the network, its samples and their scale")
    # The quotient has no scale: a power of two changes no digit, and squares then neither vanish nor overflow.
    left, right = (_centre(ldexp(matrix, -exponent_of(matrix))) for matrix in (x, y))
    scale = float(left.norm() * right.norm())
    return float((left * right).sum()) / scale if scale > 0 else float("nan")


def _centre(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def relative_frobenius_change(gram: KernelGram | Tensor, reference: KernelGram | Tensor) -> float:
    """Return |G - G_0|_F / |G_0|_F, the one number of ``kernel_drift`` that needs no eigenvalues.

    Args:
        gram: the present kernel G: a ``KernelGram`` or a symmetric float64 matrix (N, N).
        reference: the reference kernel G_0, on the same samples and outputs.

    Raises:
        ValueError: a matrix is not symmetric, not float64 or not finite; shapes, outputs, BatchNorm modes or parameters
            differ; the reference is zero.

    Cost: O(N^2).
    """
    require_comparable(gram, reference)
    now, then = _matrix(gram), _matrix(reference)
    require_symmetric(now)
    require_symmetric(then, "reference")
    then = then.to(now.device)
    return frobenius(now - then) / _norm(then)


@checked()
def kernel_drift(
    gram: KernelGram | Tensor,
    reference: KernelGram | Tensor,
    *,
    spectrum: Spectrum | None = None,
    reference_spectrum: Spectrum | None = None,
) -> Drift:
    """Compare ``gram`` with ``reference``: relative change, centred alignment and ratio of lambda_min.

    ``lambda_min_share_criterion`` of ``theory.papers.du`` judges the ratio.

    Args:
        gram: the present kernel G: a ``KernelGram`` or a symmetric float64 matrix (N, N).
        reference: the reference kernel G_0, on the same samples and outputs.
        spectrum: ``kernel_spectrum(gram)``, if it has been computed already.
        reference_spectrum: the same for the reference.

    Raises:
        ValueError: as ``relative_frobenius_change``.

    Cost: one symmetric eigenvalue problem (for the difference), and the extreme eigenvalues of both kernels unless
    given.
    """
    relative_frobenius = relative_frobenius_change(gram, reference)
    now = _matrix(gram)
    then = _matrix(reference).to(now.device)
    spectrum = spectrum or kernel_spectrum(gram, method="auto")
    reference_spectrum = reference_spectrum or kernel_spectrum(reference, method="auto")
    spectral = float(torch.linalg.eigvalsh(now - then).abs().max())
    ratio = quotient(spectrum.lambda_min, reference_spectrum.lambda_min)
    floors = sum(frobenius_floor(g) for g in (gram, reference))
    return Drift(
        relative_frobenius=relative_frobenius,
        relative_spectral=spectral / reference_spectrum.lambda_max.value,
        spectral_over_lambda_min=divide(spectral, reference_spectrum.lambda_min.value),
        alignment=centred_alignment(now, then),
        lambda_min_ratio=ratio,
        floor=floors / _norm(then),
    )


def _matrix(gram: KernelGram | Tensor) -> Tensor:
    return gram.matrix if isinstance(gram, KernelGram) else gram


def _norm(reference: Tensor) -> float:
    size = frobenius(reference)
    if size == 0:
        raise ValueError("reference: the matrix is zero, so a relative change is not defined; use a later reference")
    return size


def frobenius_floor(gram: KernelGram | Tensor) -> float:
    """Return an error bound in the Frobenius norm.

    It is the floor of the products, plus the first-order effect 2 |J|_2 |dJ|_F of rounding in J.
    """
    if not isinstance(gram, KernelGram):
        return 0.0
    return gram.floor + 2 * gram.jacobian_error * gram.trace


def require_comparable(gram: KernelGram | Tensor, reference: KernelGram | Tensor) -> None:
    """Refuse two kernels that are not the same kernel at two moments.

    Raises:
        ValueError: shapes, outputs, BatchNorm modes or parameters differ.
    """
    shapes = [tuple(_matrix(g).shape) for g in (gram, reference)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"reference: shape {shapes[1]} against {shapes[0]}; both kernels must be on the same samples and outputs"
        )
    if isinstance(gram, KernelGram) and isinstance(reference, KernelGram):
        for name in ("outputs", "batch_norm", "n_outputs"):
            here, there = getattr(gram, name), getattr(reference, name)
            if here != there:
                raise ValueError(f"reference: {name}={there!r} against {here!r}, so the two are different kernels")
        if set(gram.parameters) != set(reference.parameters):
            other = ", ".join(sorted(set(gram.parameters) ^ set(reference.parameters)))
            raise ValueError(
                f"reference: the kernels are over different parameters (only one of them over {other}), so their difference is not a "
                "drift; pass the same parameters= to ntk_gram"
            )
