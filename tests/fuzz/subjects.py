"""Public functions and classes with arguments that are right: each is called with one of them replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import lightning_conv as lc
from lightning_conv import callbacks, expressivity, losses, metrics, recipes, theory

N = 6


def rand(*shape: int) -> torch.Tensor:
    """Return numbers that are the same each time."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    """Return a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def wide() -> nn.Module:
    """Return a network whose last hidden layer is wide."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2))


def problem() -> lc.HeadProblem:
    """Return a problem of a last layer."""
    return lc.HeadProblem(rand(N, 4).double(), rand(N, 2).double(), nn.MSELoss())


def gram() -> lc.KernelGram:
    """Return a kernel."""
    return lc.ntk_gram(net(), rand(N, 3))


def comparator() -> lc.Comparator:
    """Return a comparator."""
    return lc.Comparator(1.0, 2.0)


@dataclass(frozen=True)
class Subject:
    """A function with arguments that are right, made anew for each call."""

    function: Callable[..., object]
    right: Callable[[], dict[str, object]]
    left_out: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the names of its arguments."""
        kinds = inspect.Parameter
        return [
            each.name
            for each in inspect.signature(self.function).parameters.values()
            if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY) and each.name not in self.left_out
        ]


def _model(**more: object) -> Callable[[], dict[str, object]]:
    return lambda: {"model": net(), "inputs": rand(N, 3), **more}


ACTIVATION = nn.Softplus()

SUBJECTS: dict[str, Subject] = {
    "ntk_gram": Subject(lc.ntk_gram, _model(), ("processes",)),
    "ntk_gram projected": Subject(
        lc.ntk_gram, _model(outputs="projected", projections=4, cotangents=None), ("processes",)
    ),
    "plan_ntk": Subject(lc.plan_ntk, _model()),
    "NTKOperator": Subject(lc.NTKOperator, _model()),
    "resolved_spectrum": Subject(lc.resolved_spectrum, _model(), ("processes",)),
    "lambda_min_bound": Subject(lc.lambda_min_bound, _model()),
    "label_audit": Subject(
        lc.label_audit, lambda: {"model": net(), "inputs": rand(12, 3), "targets": torch.arange(12) % 2}
    ),
    "find_head": Subject(lc.find_head, _model()),
    "last_hidden_features": Subject(
        lc.last_hidden_features,
        lambda: {"model": (m := net()), "head": lc.find_head(m, rand(N, 3)), "inputs": rand(N, 3)},
    ),
    "kernel_spectrum": Subject(lc.kernel_spectrum, lambda: {"gram": gram()}),
    "kernel_drift": Subject(lc.kernel_drift, lambda: {"gram": gram(), "reference": gram()}),
    "layer_spectra": Subject(lc.layer_spectra, lambda: {"gram": lc.ntk_gram(net(), rand(N, 3), per_layer=True)}),
    "certify_expressivity": Subject(lc.certify_expressivity, lambda: {"features": rand(N, 9).double()}, ("processes",)),
    "closest_rows": Subject(expressivity.closest_rows, lambda: {"matrix": rand(N, 3).double()}),
    "plan_stream": Subject(expressivity.plan_stream, lambda: {"samples": 10, "width": 20}),
    "smallest_eigenvalue": Subject(lc.smallest_eigenvalue, lambda: {"matrix": torch.eye(4).double()}),
    "largest_eigenvalue": Subject(lc.largest_eigenvalue, lambda: {"matrix": torch.eye(4).double()}),
    "ritz_bounds": Subject(lc.ritz_bounds, lambda: {"matvec": lambda v: 2 * v, "size": 5}),
    "centred_alignment": Subject(lc.centred_alignment, lambda: {"x": rand(N, N), "y": rand(N, N)}),
    "c_sigma": Subject(lc.c_sigma, lambda: {"activation": ACTIVATION}),
    "fully_connected_limit": Subject(
        lc.fully_connected_limit,
        lambda: {"inputs": nn.functional.normalize(rand(4, 3)).double(), "depth": 2, "activation": ACTIVATION},
    ),
    "residual_limit": Subject(
        lc.residual_limit,
        lambda: {"inputs": nn.functional.normalize(rand(4, 3)).double(), "depth": 2, "activation": ACTIVATION},
    ),
    "convolutional_limit": Subject(
        lc.convolutional_limit, lambda: {"images": rand(3, 1, 4, 4).double(), "depth": 2, "activation": ACTIVATION}
    ),
    "h_infinity": Subject(lc.h_infinity, lambda: {"inputs": nn.functional.normalize(rand(4, 3)).double()}),
    "HeadProblem": Subject(
        lc.HeadProblem,
        lambda: {"features": rand(N, 4).double(), "targets": rand(N, 2).double(), "loss_fn": nn.MSELoss()},
    ),
    "solve_head": Subject(lc.solve_head, lambda: {"problem": problem()}),
    "head_curvature": Subject(lc.head_curvature, lambda: {"problem": problem()}),
    "batch_curvature": Subject(lc.batch_curvature, lambda: {"problem": problem(), "batch_size": 2}),
    "gradient_bound": Subject(
        lc.gradient_bound,
        lambda: {"problem": lc.HeadProblem(rand(N, 4).double(), torch.arange(N) % 2, nn.CrossEntropyLoss(), outputs=2)},
    ),
    "comparator": Subject(
        lc.comparator,
        lambda: {"problem": problem(), "start": torch.zeros(5, 2).double(), "w": torch.ones(5, 2).double()},
    ),
    "comparators": Subject(lc.comparators, lambda: {"problem": problem(), "start": torch.zeros(5, 2).double()}),
    "gradient_descent_bound": Subject(
        lc.gradient_descent_bound, lambda: {"comparators": comparator(), "step": 0.1, "steps": 5}
    ),
    "gradient_descent_steps": Subject(
        lc.gradient_descent_steps, lambda: {"comparators": comparator(), "step": 0.1, "gap": 0.5}
    ),
    "linear_bound": Subject(lc.linear_bound, lambda: {"gap": 1.0, "step": 0.1, "curvature_min": 0.5, "steps": 5}),
    "sgd_bound": Subject(lc.sgd_bound, lambda: {"comparators": comparator(), "gradient_bound": 1.0, "steps": rand(5)}),
    "sgd_interpolation_bound": Subject(
        lc.sgd_interpolation_bound, lambda: {"comparators": comparator(), "batch_curvature": 1.0, "steps": rand(5)}
    ),
    "step_size_ratio": Subject(lc.step_size_ratio, lambda: {"step": 0.1, "lambda_max": 2.0}),
    "predicted_contraction": Subject(
        lc.predicted_contraction,
        lambda: {"eigenvalues": rand(3), "eigenvectors": torch.eye(3), "residual": rand(3), "steps": {0.1: 5}},
    ),
    "PowerSchedule": Subject(lc.PowerSchedule, lambda: {"first": 0.1}),
    "loss_kind": Subject(losses.loss_kind, lambda: {"loss_fn": nn.MSELoss()}),
    "loss_facts": Subject(
        losses.loss_facts, lambda: {"loss_fn": nn.MSELoss(), "outputs": rand(N, 2), "targets": rand(N, 2)}
    ),
    "loss_scale": Subject(losses.loss_scale, lambda: {"loss_fn": nn.MSELoss(), "samples": 5, "outputs": 2}),
    "curvature": Subject(losses.curvature, lambda: {"smoothness": 1.0, "sigma_max": 2.0, "samples": 5}),
    "Probe": Subject(callbacks.Probe, lambda: {"size": 8}),
    "LambdaMin": Subject(callbacks.LambdaMin, dict),
    "KernelStability": Subject(callbacks.KernelStability, dict),
    "ConvergenceCriteria": Subject(callbacks.ConvergenceCriteria, dict),
    "ConvergenceHealth": Subject(callbacks.ConvergenceHealth, dict),
    "ConvergenceDiagnostics": Subject(callbacks.ConvergenceDiagnostics, dict),
    "ConvergenceReport": Subject(callbacks.ConvergenceReport, dict),
    "ExpressivityGuard": Subject(callbacks.ExpressivityGuard, dict),
    "RegularizedGradientClipping": Subject(callbacks.RegularizedGradientClipping, lambda: {"gamma": 1.0}),
    "ExpressivityRank": Subject(metrics.ExpressivityRank, dict),
    "KernelAlignment": Subject(metrics.KernelAlignment, lambda: {"reference": torch.eye(3).double()}),
    "KernelDrift": Subject(metrics.KernelDrift, lambda: {"reference": torch.eye(3).double()}),
    "DuFC": Subject(theory.DuFC, lambda: {"inputs": 3, "width": 8, "depth": 2}),
    "DuResNet": Subject(theory.DuResNet, lambda: {"inputs": 3, "width": 8, "depth": 2}),
    "DuConvResNet": Subject(theory.DuConvResNet, lambda: {"channels": 1, "image_size": (4, 4), "width": 4, "depth": 2}),
    "DuTwoLayer": Subject(theory.DuTwoLayer, lambda: {"inputs": 3, "width": 8}),
    "BiasedTwoLayer": Subject(theory.BiasedTwoLayer, lambda: {"inputs": 3, "width": 8, "threshold": 0.5}),
    "LeakyTwoLayer": Subject(theory.LeakyTwoLayer, lambda: {"inputs": 3, "width": 8}),
    "LinearNetwork": Subject(theory.LinearNetwork, lambda: {"sizes": [3, 4, 2]}),
    "AllenZhuNet": Subject(theory.AllenZhuNet, lambda: {"inputs": 3, "width": 8, "depth": 2, "outputs": 1}),
    "Objective": Subject(
        theory.Objective, lambda: {"model": net(), "inputs": rand(N, 3), "targets": rand(N, 2), "loss_fn": nn.MSELoss()}
    ),
    "WideFC": Subject(recipes.WideFC, dict),
    "BNResNet": Subject(recipes.BNResNet, dict),
    "LoRALinear": Subject(recipes.LoRALinear, lambda: {"in_features": 3, "out_features": 2, "rank": 1}),
    "GPT": Subject(recipes.GPT, lambda: {"vocabulary": 7, "positions": 5, "width": 8, "depth": 1, "heads": 2}),
    "wide_fc": Subject(recipes.wide_fc, lambda: {"in_features": 3, "num_classes": 2, "width": 8}),
    "bn_resnet": Subject(
        recipes.bn_resnet, lambda: {"in_channels": 1, "num_classes": 2, "width": 8, "arch": "resnet8", "channels": 2}
    ),
    "widen_head": Subject(recipes.widen_head, lambda: {"model": net(), "n": 4}),
    "make_analytic": Subject(recipes.make_analytic, lambda: {"model": net()}),
    "add_adapters": Subject(recipes.add_adapters, lambda: {"network": net(), "rank": 1}),
    "DigitsDataModule": Subject(recipes.DigitsDataModule, dict),
    "LanguageDataModule": Subject(recipes.LanguageDataModule, dict),
    "TextDataModule": Subject(recipes.TextDataModule, dict),
}
"""By name; what cannot be called without a run or a folder is tried by the tests of runs."""
