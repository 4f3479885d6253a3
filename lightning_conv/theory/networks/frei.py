"""``LeakyTwoLayer``: one hidden leaky ReLU layer with fixed output weights (Frei et al. 2023; Kou, Chen, Gu 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_conv.checked import SEED, checked, whole
from lightning_conv.theory.networks.initialisation import gaussian, require_sizes


class SmoothLeakyReLU(nn.Module):
    r"""phi(z) = gamma z + (1 - gamma) ln((1 + e^z) / 2), with slopes from gamma to 1, phi(0) = 0, phi'' <= 1/4.

    Args:
        slope: gamma, in (0, 1).
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, z: Tensor) -> Tensor:
        """Return phi(z), entry by entry."""
        return self.slope * z + (1 - self.slope) * (nn.functional.softplus(z, threshold=40) - math.log(2))


class LeakyTwoLayer(nn.Module):
    r"""f(x) = sum_j a_j phi(w_j . x) with a_j = +-1/sqrt m fixed, w_j ~ N(0, s^2 I) trained, phi = max(gamma z, z).

    Half of the a_j are positive and half are negative (for odd m there is one more positive one).

    Args:
        inputs: Length of an input x.
        width: Number m of units.
        slope: gamma in [0, 1); 0 gives the ReLU.
        std: Standard deviation s. The theorems about gradient descent require a small one.
        smooth: Use ``SmoothLeakyReLU`` instead of the leaky ReLU, as in the theorem about gradient descent.
        seed: Seed of the initialisation.
        dtype: Type of the weights.

    Raises:
        ValueError: A size is not positive, gamma lies outside [0, 1), or gamma is 0 for a smooth activation.

    Source: Frei, Vardi, Bartlett, Srebro, Hu 2023 (arXiv 2210.07082), section 2.
    """

    @checked(inputs=whole(1), width=whole(1), seed=SEED)
    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        slope: float = 0.1,
        std: float = 1e-3,
        smooth: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        require_sizes(inputs=inputs, width=width)
        if not (0 < slope < 1 or (slope == 0 and not smooth)):
            raise ValueError(f"slope: {slope}; need 0 < slope < 1, or 0 (the ReLU) without smooth")
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden = gaussian(inputs, width, std, generator, dtype)
        self.activation: nn.Module
        if smooth:
            self.activation = SmoothLeakyReLU(slope)
        else:
            self.activation = nn.LeakyReLU(slope) if slope else nn.ReLU()
        a = torch.ones(width, dtype=dtype)
        a[torch.randperm(width, generator=generator)[: width // 2]] = -1
        self.register_buffer("a", a / math.sqrt(width))
        self.slope = slope

    @property
    def weight(self) -> Tensor:
        """W with rows w_j, (m, inputs), detached."""
        return self.hidden.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x_i), (n, 1), for x (n, inputs)."""
        h: Tensor = self.activation(self.hidden(x))
        a: Tensor = self.a  # type: ignore[assignment]
        return (h @ a)[:, None]

    def linear_part(self) -> Tensor:
        """Return z = sum_j a_j w_j, (inputs,): sign f(x) = sign(z . x) if the w_j depend only on the sign of a_j."""
        a: Tensor = self.a  # type: ignore[assignment]
        return a @ self.weight
