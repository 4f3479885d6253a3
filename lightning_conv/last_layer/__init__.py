"""Phase 2 in plain torch: the convex problem of the last linear layer, with proven step sizes and bounds.

Its names are imported at once: ``comparators`` is a function and a module, and the one imported last would be what the package has.
"""

from lightning_conv.last_layer.bounds import (
    Comparator,
    gradient_descent_bound,
    gradient_descent_steps,
    linear_bound,
    rounded_bound,
    sgd_bound,
    sgd_interpolation_bound,
)
from lightning_conv.last_layer.comparators import comparator, comparators
from lightning_conv.last_layer.dual import DualBound, HeadDual
from lightning_conv.last_layer.gram import LeastChange, SingularError, least_change
from lightning_conv.last_layer.prescribed import prescribed_outputs
from lightning_conv.last_layer.problem import HeadProblem
from lightning_conv.last_layer.search import SolveMethod
from lightning_conv.last_layer.sigma import sigma_max, sigma_min
from lightning_conv.last_layer.solution import HeadSolution
from lightning_conv.last_layer.solve import solve_head
from lightning_conv.last_layer.step_size import (
    HeadCurvature,
    PowerSchedule,
    batch_curvature,
    gradient_bound,
    head_curvature,
)
from lightning_conv.losses.per_sample import SampleLosses

__all__ = [
    "Comparator",
    "DualBound",
    "HeadCurvature",
    "HeadDual",
    "HeadProblem",
    "HeadSolution",
    "LeastChange",
    "PowerSchedule",
    "SampleLosses",
    "SingularError",
    "SolveMethod",
    "batch_curvature",
    "comparator",
    "comparators",
    "gradient_bound",
    "gradient_descent_bound",
    "gradient_descent_steps",
    "head_curvature",
    "least_change",
    "linear_bound",
    "prescribed_outputs",
    "rounded_bound",
    "sgd_bound",
    "sgd_interpolation_bound",
    "sigma_max",
    "sigma_min",
    "solve_head",
]
