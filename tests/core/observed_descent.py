"""Gradient descent on a quadratic, observed at some of its steps, for the tests of what is read from such a run."""

import torch

from lightning_conv.theory.tools.observation import Observation

VALUES = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)


def quadratic(eta: float, steps: int, every: int = 1) -> list[Observation]:
    """Gradient descent on f = 1/2 sum lambda_i w_i^2, seen at every ``every``-th step."""
    w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    start, length, history = w.clone(), 0.0, []

    def loss(w: torch.Tensor) -> float:
        return float(0.5 * (VALUES * w * w).sum())

    for t in range(steps):
        gradient = VALUES * w
        after = w - eta * gradient
        if t % every == 0:
            history.append(
                Observation(
                    t, loss(w), float(gradient.norm()), float((w - start).norm()), length, eta, loss(after),
                    float(gradient @ (after - w)), float((after - w).norm()), noise=1e-15,
                )
            )  # fmt: skip
        length += eta * float(gradient.norm())
        w = after
    return history
