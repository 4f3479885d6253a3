"""Allen-Zhu, Li & Song 2019, "A Convergence Theory for Deep Learning via Over-Parameterization", as measurements.

The theorems are about widths polynomial in the number of samples n, the depth L and 1/delta, with unspecified constants
(n^24 as stated), so none of them applies to a real run. What is measured here is the mechanism of the proof: separated
data, gradients without critical points nearby, little movement, few units that switch, and an almost smooth loss.
"""

from lightning_conv.theory.papers.allen_zhu.gradients import GradientRatios, gradient_ratios
from lightning_conv.theory.papers.allen_zhu.semi_smoothness import (
    Residual,
    SemiSmoothness,
    fit_semi_smoothness,
    residual,
    step_size,
)
from lightning_conv.theory.papers.allen_zhu.separation import (
    Separation,
    are_unit_inputs,
    direction_rounding,
    pairs_within,
    separation,
    unit_inputs,
)
from lightning_conv.theory.papers.allen_zhu.stability import (
    HiddenNorms,
    drift_constant,
    hidden_norms,
    sign_change_exponent,
    worst_size,
    worst_step,
)
from lightning_conv.theory.tools.hidden_states import forward_drift

__all__ = [
    "GradientRatios",
    "HiddenNorms",
    "Residual",
    "SemiSmoothness",
    "Separation",
    "are_unit_inputs",
    "direction_rounding",
    "drift_constant",
    "fit_semi_smoothness",
    "forward_drift",
    "gradient_ratios",
    "hidden_norms",
    "pairs_within",
    "residual",
    "separation",
    "sign_change_exponent",
    "step_size",
    "unit_inputs",
    "worst_size",
    "worst_step",
]
