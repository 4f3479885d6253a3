"""Plain gradient descent as in the theorems, and the quantities of its path: ``gradient_descent``, ``Descent``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_conv.losses.objective import Objective
from lightning_conv.reporting.progress import Report, silent


@dataclass(frozen=True)
class Descent:
    """The path x_0, ..., x_T of x_{t+1} = x_t - h_t grad f(x_t), step by step; all tensors float64."""

    losses: Tensor  # f(x_t), (T + 1,)
    gradient_norms: Tensor  # |grad f(x_t)|, (T + 1,)
    distances: Tensor  # |x_t - x_0|, (T + 1,)
    steps: Tensor  # h_t, (T,)
    final: Tensor  # x_T, (P,)

    @property
    def taken(self) -> int:
        """Number T of steps taken."""
        return len(self.steps)

    @property
    def lengths(self) -> Tensor:
        """Path length sum_{s < t} h_s |grad f(x_s)|, (T + 1,); it is at least the distance."""
        return torch.cat([self.steps.new_zeros(1), (self.steps * self.gradient_norms[:-1]).cumsum(0)])

    @property
    def ratios(self) -> Tensor:
        """a_t = |grad f|^2 / f, (T + 1,); infinite where f = 0."""
        return torch.where(self.losses > 0, self.gradient_norms.square() / self.losses, torch.inf)

    @property
    def running_infimum(self) -> Tensor:
        """Smallest a_s up to t, (T + 1,), an upper bound of the infimum over every ball around the path so far."""
        return self.ratios.cummin(0).values

    @property
    def efficiencies(self) -> Tensor:
        """e_t = (f_t - f_{t+1}) / (h_t |grad f_t|^2), (T,); it tends to 1 for small steps."""
        return (self.losses[:-1] - self.losses[1:]) / (self.steps * self.gradient_norms[:-1].square())

    @property
    def smoothness(self) -> Tensor:
        """2 (1 - e_t) / h_t, (T,), the mean curvature along the step; a lower bound of sup |Hess f| on it."""
        return 2 * (1 - self.efficiencies) / self.steps

    @property
    def rates(self) -> Tensor:
        """1 - f_{t+1} / f_t, (T,)."""
        return 1 - self.losses[1:] / self.losses[:-1]


def gradient_descent(
    objective: Objective,
    step: float | Callable[[Tensor], float],
    *,
    steps: int,
    until: float = 0.0,
    start: Tensor | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
    report: Report = silent,
) -> Descent:
    """Run full-batch gradient descent without momentum.

    Args:
        objective: The loss f as a function of the flat weights.
        step: Step size h, or a function of x that returns it.
        steps: Largest number of steps.
        until: Stop as soon as f is at most this number.
        start: x_0; None: the model's own weights.
        observe: Called with (t, x_t) before every step and at the end.
        report: Called with the share of the work that is done.

    Raises:
        ValueError: ``step`` or ``steps`` is not positive.
        FloatingPointError: The loss is no longer finite, because the step is too large.

    Cost: one forward and one backward pass per step.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}; need 1 or more")
    if not callable(step) and not step > 0:
        raise ValueError(f"step: {step}; need a positive number")
    x0 = objective.start if start is None else start.detach().double()
    x = x0.clone()
    losses, norms, distances, sizes = [], [], [], []
    for t in range(steps + 1):
        value, gradient = objective.value_and_gradient(x)
        if not value < float("inf"):
            raise FloatingPointError(f"step: the loss is {value} after {t} steps; take a smaller step")
        losses.append(value)
        norms.append(float(gradient.norm()))
        distances.append(float((x - x0).norm()))
        if observe is not None:
            observe(t, x)
        if value <= until or t == steps:
            break
        sizes.append(step(x) if callable(step) else step)
        x = x - sizes[-1] * gradient
        report((t + 1) / steps)
    f, slopes, away, h = (torch.tensor(values, dtype=torch.float64) for values in (losses, norms, distances, sizes))
    return Descent(f, slopes, away, h, x)
