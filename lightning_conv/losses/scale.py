"""The exact factors between the loss that a run uses and those that the papers use."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_conv.checked import checked, whole
from lightning_conv.losses.torch_loss import reduction, torch_loss


@dataclass(frozen=True)
class LossScale:
    r"""A run's squared loss L = k S, with :math:`S = \frac12 \sum_i |u_i - y_i|^2` over n samples of C numbers.

    Multiplying a loss by k multiplies its gradient by k. So for plain gradient descent on L with step eta

    - the step on S is k eta; on f = (1/n) sum |u - y|^2 = (2/n) S, Chatterjee's loss for C = 1, it is k n eta / 2
    - the ratio |grad L|^2 / L is k times |grad S|^2 / S
    """

    k: float
    samples: int

    @property
    def per_mean(self) -> float:
        """Ratio L / f with f = (1/n) sum |u - y|^2: k n / 2."""
        return self.k * self.samples / 2

    def step_on_sum(self, eta: float) -> float:
        """Return the step on S (Du et al., Allen-Zhu et al., Oymak & Soltanolkotabi) that equals a step eta on L."""
        return eta * self.k

    def step_on_mean(self, eta: float) -> float:
        """Return the step on f = (1/n) sum |u - y|^2 (Chatterjee) that equals a step eta on L."""
        return eta * self.per_mean


@checked(samples=whole(1), outputs=whole(1))
def loss_scale(loss_fn: object, samples: int, outputs: int) -> LossScale | None:
    """Return the scale of a squared loss of torch on n samples of C numbers; None for any other loss.

    ``nn.MSELoss`` is (1 / (n C)) sum |u - y|^2 = (2 / (n C)) S with reduction "mean", and 2 S with "sum".

    Args:
        loss_fn: the loss module of the run.
        samples: number n of samples in the loss.
        outputs: number C of outputs per sample.

    Raises:
        ValueError: n or C is not positive.

    Example:
        >>> import torch
        >>> loss_scale(torch.nn.MSELoss(), samples=10, outputs=1)
        LossScale(k=0.2, samples=10)
    """
    if torch_loss(loss_fn) != "squared":
        return None
    factor = {"mean": 2 / (samples * outputs), "sum": 2.0}.get(reduction(loss_fn))
    return None if factor is None else LossScale(factor, samples)
