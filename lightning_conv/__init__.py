"""Convergence theory diagnostics for PyTorch networks: the mathematics, without Lightning."""

from lightning_conv import _checkout, _moved

_checkout.install()
_moved.install()

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from lightning_conv._lazy import lazy

__all__ = [
    "Bounded",
    "Comparator",
    "Drift",
    "Estimate",
    "Head",
    "HeadCurvature",
    "HeadProblem",
    "HeadSolution",
    "KernelGram",
    "LabelAudit",
    "LayerRule",
    "LimitKernel",
    "NTKOperator",
    "NTKPlan",
    "OuterRule",
    "PowerSchedule",
    "RankCertificate",
    "RitzBounds",
    "SketchStore",
    "SketchedKernel",
    "Spectrum",
    "SubsetBound",
    "batch_curvature",
    "c_sigma",
    "centred_alignment",
    "certify_expressivity",
    "comparator",
    "comparators",
    "convolutional_limit",
    "find_head",
    "fully_connected_limit",
    "gradient_bound",
    "gradient_descent_bound",
    "gradient_descent_steps",
    "h_infinity",
    "head_curvature",
    "kernel_drift",
    "kernel_spectrum",
    "label_audit",
    "lambda_min_bound",
    "largest_eigenvalue",
    "last_hidden_features",
    "layer_spectra",
    "linear_bound",
    "ntk_gram",
    "plan_ntk",
    "predicted_contraction",
    "register_rule",
    "residual_limit",
    "resolved_spectrum",
    "ritz_bounds",
    "sgd_bound",
    "sgd_interpolation_bound",
    "smallest_eigenvalue",
    "solve_head",
    "step_in_sum_of_squares",
    "step_size_ratio",
]

if TYPE_CHECKING:
    from lightning_conv.expressivity import RankCertificate, certify_expressivity
    from lightning_conv.health.kernel.lambda_min_bound import lambda_min_bound
    from lightning_conv.health.kernel.subset_bound import SubsetBound
    from lightning_conv.health.labels.label_audit import label_audit
    from lightning_conv.health.labels.suspicious_labels import LabelAudit
    from lightning_conv.kernels import (
        KernelGram,
        LayerRule,
        NTKOperator,
        NTKPlan,
        OuterRule,
        ntk_gram,
        plan_ntk,
        register_rule,
    )
    from lightning_conv.kernels.contraction import predicted_contraction, step_in_sum_of_squares, step_size_ratio
    from lightning_conv.kernels.drift import Drift, centred_alignment, kernel_drift
    from lightning_conv.kernels.infinite import (
        LimitKernel,
        c_sigma,
        convolutional_limit,
        fully_connected_limit,
        h_infinity,
        residual_limit,
    )
    from lightning_conv.kernels.layers import layer_spectra
    from lightning_conv.kernels.resolve import resolved_spectrum
    from lightning_conv.kernels.spectrum import kernel_spectrum
    from lightning_conv.last_layer import (
        Comparator,
        HeadCurvature,
        HeadProblem,
        HeadSolution,
        PowerSchedule,
        batch_curvature,
        comparator,
        comparators,
        gradient_bound,
        gradient_descent_bound,
        gradient_descent_steps,
        head_curvature,
        linear_bound,
        sgd_bound,
        sgd_interpolation_bound,
        solve_head,
    )
    from lightning_conv.linalg.eigenvalues import RitzBounds, largest_eigenvalue, ritz_bounds, smallest_eigenvalue
    from lightning_conv.linalg.estimates import Estimate
    from lightning_conv.linalg.spectrum import Bounded, Spectrum
    from lightning_conv.networks.head import Head, find_head
    from lightning_conv.networks.hidden_features import last_hidden_features
    from lightning_conv.sketches import SketchedKernel, SketchStore
else:
    __getattr__, __dir__ = lazy(__name__)
