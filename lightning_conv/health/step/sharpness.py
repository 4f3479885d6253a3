r"""``sharpness``: the largest curvature of a loss in the coordinates of an optimizer's steps, by a few products.

Source: Cohen et al. 2021 (2103.00065), section 2; Cohen et al. 2022 (2207.14484), equation 3 (the preconditioned sharpness); Schraudolph
2002 (products with the Gauss-Newton matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.arguments import (
    described,
    require_callable,
    require_number,
    require_seed,
    require_type,
    require_whole,
)
from lightning_conv.health.step.step_coordinates import flat_sizes
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
        """Return an estimate of an upper end; no bound."""
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
        TypeError: See ``flat_sizes``; ``curvature`` cannot be called or returns something else, or another argument has another type.
        ValueError: See ``flat_sizes``; ``start`` is of another length, ``products`` is below 1, ``tolerance`` negative or not finite.

    Cost: a forward derivative and a backward pass for each product; ``AT_ONCE`` vectors of the weights' size.
    """
    roots = flat_sizes(operator, sizes).sqrt().to(operator.precision)
    require_callable(
        "curvature", curvature, "a function v -> S v of numbers (n, C), such as lambda v: 2 * v / v.numel()"
    )
    require_whole("products", products, least=1)
    require_number("tolerance", tolerance, least=0.0)
    require_seed(seed)
    _require_decay(decay)
    added = torch.cat(
        [roots.new_full((shape.numel(),), (decay or {}).get(name, 0.0)) for name, shape in operator.shapes.items()]
    )
    if start is not None:
        require_type("start", start, Tensor, "the vector of an earlier search, or None")
        if start.numel() != roots.numel():
            raise ValueError(
                f"start: {start.numel()} numbers for {roots.numel()} weights; need a vector over the same ones, or None"
            )

    def product(v: Tensor) -> Tensor:
        moved = roots * v[:, 0]
        bent = curvature(operator.jvp(moved).reshape(operator.n_samples, operator.n_outputs))
        if not isinstance(bent, Tensor) or bent.numel() != operator.shape[0]:
            raise TypeError(f"curvature: returned {described(bent)}; need S v, of the shape of v")
        return (roots * (operator.transposed(bent.reshape(-1)).to(roots.dtype) + added * moved))[:, None]

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


def _require_decay(decay: object) -> None:
    """Refuse what is no decay by name."""
    if decay is None:
        return
    require_type("decay", decay, Mapping, "what weight_decay adds by the name of the weight, or None")
    for name, each in decay.items():  # type: ignore[attr-defined]
        require_number(f"decay[{name!r}]", each)
