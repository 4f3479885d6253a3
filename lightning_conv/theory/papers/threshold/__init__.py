r"""Threshold networks trained to the global optimum by a convex program (Ergen et al., ICLR 2023, 2303.03382).

The weight-decay problem of a two-layer network f(x) = sum_j s_j w_j 1{<v_j, x> >= 0} with trainable amplitudes s_j is

.. math:: \inf \tfrac12 |f(X) - y|^2 + \tfrac\beta2 \sum_j (|v_j|^2 + s_j^2 + w_j^2).

The units depend only on the direction of v_j, so its norm may tend to zero (the infimum is approached and not
attained), and (s^2 + w^2) / 2 >= |s w| with equality for |s| = |w|. The problem reduces to a LASSO over the distinct
activation patterns of the samples,

.. math:: \min_w \tfrac12 |D w - y|^2 + \beta |w|_1, \qquad D_{\cdot j} = 1\{X v_j \ge 0\} \in \{0, 1\}^n,

for networks with as many units as the solution has nonzero weights, which is at most n. There is no 1/n in front of the
loss.
"""

from lightning_conv.theory.papers.threshold.arrangement import Arrangement, arrangement_patterns, cell_count
from lightning_conv.theory.papers.threshold.optimum import (
    ThresholdOptimum,
    duality_gap,
    fewest_units,
    lasso_objective,
    shattered_optimum,
    solve_threshold_network,
)

SOURCE = "Ergen et al. 2023 (2303.03382)"

__all__ = [
    "SOURCE",
    "Arrangement",
    "ThresholdOptimum",
    "arrangement_patterns",
    "cell_count",
    "duality_gap",
    "fewest_units",
    "lasso_objective",
    "shattered_optimum",
    "solve_threshold_network",
]
