"""``lanczos``: block Lanczos with full reorthogonalisation, for any symmetric operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Matvec: TypeAlias = Callable[[Tensor], Tensor]
"""Function v -> A v for a symmetric A, on columns: (N, b) -> (N, b)."""


@dataclass(frozen=True)
class Krylov:
    """An orthonormal basis Q of a Krylov space of A with T = Q^T A Q.

    They satisfy A Q = Q T + R, where R is zero except for its last columns.
    """

    basis: Tensor  # Q, (N, k), orthonormal columns
    projected: Tensor  # T, (k, k), symmetric, block tridiagonal (tridiagonal for one start vector)
    coupling: Tensor
    """B, (b, b'), with R = Q' B in the last b' columns, where Q' is the block that would come next; (0, b') if
    invariant."""
    asymmetry: float
    """Largest deviation of Q^T A Q from its mirror image, relative to the largest |A q|; only rounding, if A is
    symmetric."""

    @property
    def invariant(self) -> bool:
        """Whether A Q = Q T up to rounding; the Ritz values are then eigenvalues, and further steps add nothing."""
        return len(self.coupling) == 0

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ascending Ritz values (k,), coordinates S (k, k) of the Ritz vectors Q S, and residuals (k,).

        In exact arithmetic the residual |A y - theta y| of the Ritz pair (theta, y = Q s) is |B s_last|; rounding adds
        about u |A|.
        """
        values, coordinates = torch.linalg.eigh(self.projected)
        last = coordinates[len(coordinates) - self.coupling.shape[1] :]
        return values, coordinates, (self.coupling @ last).norm(dim=0)


def lanczos(
    matvec: Matvec,
    size: int,
    *,
    steps: int,
    start: Tensor | None = None,
    block: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    stop: Callable[[Krylov], bool] | None = None,
) -> Krylov:
    r"""Compute an orthonormal basis of the Krylov space span {X, A X, ..., A^{steps-1} X}, fully reorthogonalised.

    .. math:: A Q_j = Q_{j-1} B_{j-1}^T + Q_j A_j + Q_{j+1} B_j

    Each new block is orthogonalised twice against the whole basis (classical Gram-Schmidt, "twice is enough"). So Q^T Q
    = I to a few units of roundoff, and no eigenvalue appears repeatedly by rounding. Directions that the space already
    contains are dropped: the block shrinks, and the recurrence ends when the space is invariant. One start vector finds
    only one direction of each eigenspace, b of them find b.

    Args:
        matvec: v -> A v for a symmetric A, on floating-point columns (N, b).
        size: N.
        steps: largest number of calls of ``matvec``.
        start: X, (N,) or (N, b), with linearly independent columns; None: standard normal numbers from ``seed``.
        block: b, the number of columns of the random start.
        seed: seed of the random start, which is drawn on the CPU and hence the same on every device.
        dtype: dtype of the random start and of the recurrence.
        device: device of the random start. If ``start`` is given, its dtype and device are used instead.
        stop: called after each step; True ends the recurrence.

    Returns:
        The basis, the projected matrix and what couples them to the next block.

    Raises:
        ValueError: ``steps`` is below 1; ``start`` has the wrong shape or not full rank; ``matvec`` returns a wrong
            shape or NaN.

    Cost: ``steps`` calls of ``matvec``, 4 N k^2 flops and N k numbers for a basis of k <= b steps columns.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., 10.3.6 (block Lanczos); Giraud, Langou, Rozloznik 2005
    (twice is enough).

    Example:
        >>> import torch
        >>> diagonal = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)
        >>> lanczos(lambda v: diagonal * v, 3, steps=3).ritz()[0]
        tensor([1.0000, 2.0000, 5.0000], dtype=torch.float64)
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}; need at least 1")
    queue = _first_block(size, start, block, seed, dtype, device)
    capacity = min(size, steps * queue.shape[1])
    rows = queue.new_empty(capacity, size)  # Q^T, filled from the top: products with it read contiguous memory
    projected = queue.new_zeros(capacity, capacity)
    scale, asymmetry = queue.new_zeros(()), queue.new_zeros(())
    first, filled = 0, queue.shape[1]
    for _ in range(steps):
        rows[first:filled] = queue.T
        images = matvec(queue)
        _require_image(images, queue)
        known = rows[:filled]
        heights = known @ images
        scale = torch.maximum(scale, images.norm(dim=0).max())
        asymmetry = torch.maximum(asymmetry, _mirror_error(heights, projected[:first, first:filled]))
        projected[first:filled, first:filled] = (heights[first:] + heights[first:].T) / 2
        queue, coupling = _next_block(images - known.T @ heights, known, scale)
        relative = float(asymmetry / scale) if scale > 0 else 0.0
        krylov = Krylov(known.T, projected[:filled, :filled], coupling, relative)
        # After the last step only a part of the next block may fit, if an earlier block has shrunk.
        if len(coupling) == 0 or filled + len(coupling) > capacity or (stop is not None and stop(krylov)):
            break
        first, filled = filled, filled + len(coupling)
        projected[first:filled, first - coupling.shape[1] : first] = coupling
        projected[first - coupling.shape[1] : first, first:filled] = coupling.T
    return krylov


def _first_block(
    size: int, start: Tensor | None, block: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    if start is None:
        if not 1 <= block <= size:
            raise ValueError(f"block: {block}; need 1 to {size}, the size of the operator")
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(size, block, generator=generator, dtype=dtype).to(device)
    elif start.ndim not in {1, 2} or len(start) != size or start.numel() == 0:
        raise ValueError(f"start: shape {tuple(start.shape)}; need ({size},) or ({size}, b)")
    basis: Tensor
    basis, factor = torch.linalg.qr(start.reshape(size, -1))
    spread = torch.linalg.svdvals(factor)
    if basis.shape[1] < start.reshape(size, -1).shape[1] or not bool(spread[-1] > 1e-8 * spread[0]):
        raise ValueError("start: its columns are zero, NaN or linearly dependent; pass linearly independent columns")
    return basis


def _next_block(residual: Tensor, known: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Q', B) with residual = Q' B and Q' orthonormal and orthogonal to the rows of ``known``.

    Directions at the level of rounding are dropped.
    """
    size, room = len(residual), len(residual) - len(known)
    basis, coupling, spread = _ranked(residual)
    tolerance = 4 * size**0.5 * torch.finfo(residual.dtype).eps * scale
    kept = min(int((spread > tolerance).sum()), room)
    basis, coupling = basis[:, :kept], coupling[:kept]
    if kept:
        # After the normalisation, so that the second pass also cleans directions that nearly cancelled in the first.
        basis, factor = _qr(basis - known.T @ (known @ basis))
        coupling = factor @ coupling
    return basis, coupling


def _ranked(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Q, B, s) with columns = Q B, Q orthonormal, and the norms s of the rows of B in descending order."""
    basis, factor = _qr(columns)
    if columns.shape[1] == 1:
        return basis, factor, factor[0]
    left, spread, right = torch.linalg.svd(factor)
    return basis @ left, spread[:, None] * right, spread


def _qr(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return thin QR factors; for one column R is its norm, positive as in the textbook recurrence."""
    if columns.shape[1] == 1:
        norm = columns.norm()
        return columns / torch.where(norm > 0, norm, 1), norm.reshape(1, 1)
    basis, factor = torch.linalg.qr(columns)
    return basis, factor


def _mirror_error(heights: Tensor, expected: Tensor) -> Tensor:
    """Return the largest difference between new columns of Q^T A Q and known rows, which symmetry makes equal."""
    mirrored = torch.cat([expected, heights[len(expected) :].T])
    error: Tensor = torch.linalg.vector_norm(heights - mirrored, float("inf"))
    return error


def _require_image(images: Tensor, queue: Tensor) -> None:
    if images.shape != queue.shape:
        raise ValueError(
            f"matvec: shape {tuple(queue.shape)} became {tuple(images.shape)}; it must map columns (N, b) to (N, b)"
        )
    if not bool(torch.isfinite(images).all()):
        raise ValueError("matvec: returned NaN or infinity")
