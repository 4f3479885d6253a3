"""Chatterjee, Convergence of gradient descent for deep neural networks (2203.16462): a local criterion, evaluated.

A non-negative function f, a start x_0 and a radius r satisfy the criterion if 4 f(x_0) < r^2 alpha(x_0, r), where alpha
is the infimum of |grad f|^2 / f over the ball B(x_0, r). The module ``ratio`` has the inequalities, ``sampling`` can
refute them, ``certificate`` can prove them, ``positive`` has the initialisation for which the proof succeeds, ``path``
judges a run of full-batch gradient descent, and ``descent`` a run that is observed at some of its steps. The criterion is
that of version 1 of the paper (30 March 2022); ``docs/theory/chatterjee.md`` says what of it is used.
"""

from lightning_conv.theory.papers.chatterjee.certificate import (
    DescentCertificate,
    affine_independence,
    certify_alpha,
    certify_descent,
)
from lightning_conv.theory.papers.chatterjee.path import judge_path
from lightning_conv.theory.papers.chatterjee.positive import (
    judge_positive_start,
    positive_init_,
    smallest_output_weight,
)
from lightning_conv.theory.papers.chatterjee.ratio import (
    ScoreCeiling,
    alpha_ratio,
    criterion_score,
    judge_ball,
    least_radius,
    length_bound,
    score_ceiling,
)
from lightning_conv.theory.papers.chatterjee.sampling import (
    Landscape,
    SampledInfimum,
    aligned_points,
    sampled_alpha,
    sampled_infima,
)

__all__ = [
    "DescentCertificate",
    "Landscape",
    "SampledInfimum",
    "ScoreCeiling",
    "affine_independence",
    "aligned_points",
    "alpha_ratio",
    "certify_alpha",
    "certify_descent",
    "criterion_score",
    "judge_ball",
    "judge_path",
    "judge_positive_start",
    "least_radius",
    "length_bound",
    "positive_init_",
    "sampled_alpha",
    "sampled_infima",
    "score_ceiling",
    "smallest_output_weight",
]
