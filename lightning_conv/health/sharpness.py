r"""``sharpness``: the largest curvature of a loss in the coordinates of an optimizer's steps, by a few products.

Source: Cohen et al. 2021 (2103.00065), section 2; Cohen et al. 2022 (2207.14484), equation 3 (the preconditioned sharpness); Schraudolph
2002 (products with the Gauss-Newton matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.kernels.operator import NTKOperator
from lightning_conv.linalg.lanczos import Krylov, lanczos

AT_ONCE = 8
"""Products of a Lanczos recurrence before it begins again from its best vector: so many vectors of the weights' size are kept."""


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue, from below, with what is known of its distance.

    Attributes:
        value: Rayleigh quotient of ``vector``: no more than the largest eigenvalue.
        residual: An eigenvalue lies within it; that it is the largest one is likely, not proven.
        vector: In the coordinates of the steps, flat; the next search begins with it.
        products: How many products were taken.
    """

    value: float
    residual: float
    vector: Tensor
    products: int

    @property
    def upper(self) -> float:
        """An estimate of an upper end; no bound."""
        return self.value + self.residual


def sharpness(
    operator: NTKOperator,
    curvature: Callable[[Tensor], Tensor],
    sizes: Mapping[str, Tensor],
    *,
    decay: Mapping[str, float] | None = None,
    start: Tensor | None = None,
    products: int = 20,
    tolerance: float = 0.01,
    seed: int = 0,
) -> Sharpness:
    r"""Search the largest eigenvalue of the Gauss-Newton matrix in the coordinates of an optimizer's steps.

    .. math:: \lambda_{\max}\big( D^{1/2} (J^T S J + W) D^{1/2} \big)

    J is the Jacobian of the outputs, S the Hessian of the loss in the outputs, and W holds what ``weight_decay`` adds. With D the step
    sizes over the limit of the update rule (``StepSizes.relative``) it is the stability ratio: 1 is the edge.

    Args:
        operator: J, with ``outputs="full"``.
        curvature: v -> S v for v (n, C), S symmetric and positive semidefinite.
        sizes: D by name of the weights, each of the weight's shape or a number; weights that are left out do not move.
        decay: W by name.
        start: ``vector`` of an earlier search over the same weights; None: random numbers.
        products: Largest number of products.
        tolerance: Relative residual at which to stop.
        seed: Seed of the random numbers.

    Raises:
        ValueError: ``outputs`` of the operator is another one, no weight has a step size, or ``start`` is of another length.

    Cost: a forward derivative and a backward pass for each product; ``AT_ONCE`` vectors of the weights' size.
    """
    if operator.outputs != "full":
        raise ValueError(f'operator: outputs={operator.outputs!r}; need outputs="full"')
    weights = operator.shapes
    if not set(weights) & set(sizes):
        raise ValueError(f"sizes: {sorted(sizes)}; none of them is a weight of the operator ({sorted(weights)})")
    roots = torch.cat([_root(sizes.get(name), shape, operator) for name, shape in weights.items()])
    added = torch.cat(
        [roots.new_full((shape.numel(),), (decay or {}).get(name, 0.0)) for name, shape in weights.items()]
    )
    if start is not None and start.numel() != roots.numel():
        raise ValueError(f"start: {start.numel()} numbers for {roots.numel()} weights")

    def product(v: Tensor) -> Tensor:
        moved = roots * v[:, 0]
        bent = curvature(operator.jvp(moved).reshape(operator.n_samples, operator.n_outputs)).reshape(-1)
        return (roots * (operator.transposed(bent).to(roots.dtype) + added * moved))[:, None]

    def close(krylov: Krylov) -> bool:
        values, _, residuals = krylov.ritz()
        return float(residuals[-1]) <= tolerance * abs(float(values[-1]))

    taken, vector = 0, start
    while True:
        krylov = lanczos(
            product,
            roots.numel(),
            steps=max(1, min(AT_ONCE, products - taken)),
            start=None if vector is None else vector.to(roots),
            seed=seed,
            dtype=roots.dtype,
            device=roots.device,
            stop=close,
        )
        values, coordinates, residuals = krylov.ritz()
        taken += krylov.basis.shape[1]
        vector = krylov.basis @ coordinates[:, -1]
        if krylov.invariant or close(krylov) or taken >= products:
            return Sharpness(float(values[-1]), float(residuals[-1]), vector, taken)


def _root(size: Tensor | None, shape: torch.Size, operator: NTKOperator) -> Tensor:
    """Return the root of D for one weight, flat."""
    given = torch.zeros(()) if size is None else size
    return given.to(operator.device, torch.float64).sqrt().expand(shape).reshape(-1).to(operator.precision)
