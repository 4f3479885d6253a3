"""Finder for the old names of modules that have moved; importing one gives a ``DeprecationWarning`` with the new name.

The module under the old name is the same object as the module under the new one, so classes and registries exist only
once.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# New package -> (old package, modules that have kept their names).
_SAME_NAME = {
    "linalg": ("", "eigenvalues lanczos estimates spectral_estimates"),
    "kernels": ("", "layers drift contraction spectrum"),
    "networks": ("", "evaluation batch_norm wide_layer analytic recomputation watched activation"),
    "reporting": ("", "report markdown plots progress"),
    "kernels.reading": ("kernels", "first_forward reach recording sample_axis samples sites"),
    "kernels.planning": ("kernels", "costs passes task"),
    "kernels.engine": ("kernels", "collectors coupled factors"),
    "kernels.products": ("kernels", "precision jacobian_map pullback pushforward"),
    "machine": ("kernels", "gemm memory"),
    "losses": ("theory", "objective"),
    "theory.tools": (
        "theory",
        "activations ball_bounds descent hidden_states matrix_norms observation power_law running_error smooth_mlp",
    ),
    "theory.papers": (
        "theory",
        "allen_zhu chatterjee du averaged_sgd bias_ntk clipping linear_networks linear_regions oymak",
    ),
    "callbacks.run": ("callbacks", "batch probe schedule"),
    "callbacks.monitors": ("callbacks", "kernel_stability lambda_min step_size spectral_decay"),
    "callbacks.guard.certify": ("callbacks.guard", "caveats certificate verdict"),
    "callbacks.guard.head": (
        "callbacks.guard",
        "curvature descent feature_cache phase_two plain_steps step_rounding trunk",
    ),
}
_RENAMED = {
    "kernels.discovery": "kernels.reading.anatomy",
    "kernels.formed": "kernels.engine.formed_factor",
    "kernels.jacobian": "kernels.engine.per_sample_jacobian",
    "kernels.pass_flops": "kernels.planning.pass_cost",
    "kernels.projection": "kernels.engine.kernel",
    "kernels.reading_memory": "kernels.reading.memory",
    "kernels.rounding": "kernels.reading.jacobian_error",
    "kernels.selection": "kernels.reading.parameters",
    "kernels.sums": "kernels.engine.kernel_sum",
    "anatomy": "networks.head",
    "float32": "networks.precision",
    "float64": "networks.precision",
    "two_phase": "networks.perturbation",
    "loss_gradient": "losses.gradient",
    "theory.loss_scale": "losses.scale",
    "theory.squared_loss": "losses.squared",
    "theory.implicit_bias": "theory.papers.frei",
    "theory.kawaguchi_sun": "theory.papers.kawaguchi_sun.expressivity",
    "theory.phase_two": "theory.papers.kawaguchi_sun.phase_two",
    "theory.threshold_networks": "theory.papers.threshold",
    "theory.networks.biased": "theory.networks.bias_ntk",
    "theory.networks.leaky": "theory.networks.frei",
    "theory.networks.linear": "theory.networks.linear_networks",
    "callbacks.expressivity_guard": "callbacks.guard.callback",
    "callbacks.guard.compared_loss": "callbacks.guard.head.loss_check",
    "callbacks.guard.descent_bound": "callbacks.guard.head.bounded_steps",
    "callbacks.guard.epoch": "callbacks.run.sampling",
    "callbacks.guard.head_steps": "callbacks.guard.head.steps",
    "callbacks.guard.kept_folder": "callbacks.guard.certify.work_folder",
    "callbacks.guard.known_outputs": "callbacks.guard.head.cached_outputs",
    "callbacks.guard.plan": "callbacks.guard.switch.moment",
    "callbacks.guard.rank_track": "callbacks.guard.certify.certificate",
    "callbacks.guard.ranks": "callbacks.run.ranks",
    "callbacks.guard.reason": "callbacks.guard.switch.report",
    "callbacks.guard.solved_head": "callbacks.guard.head.solved",
    "callbacks.guard.switching": "callbacks.guard.switch.moment",
    "callbacks.guard.training_set": "callbacks.run.training_set",
    "callbacks.kernel_monitor": "callbacks.monitors.base",
    "callbacks.breach": "callbacks.run.assumptions",
    "callbacks.hypotheses": "callbacks.run.violations",
    "callbacks.data_hypotheses": "callbacks.run.data",
    "callbacks.probe_kernel": "callbacks.run.measurement",
    "callbacks.layer_norms": "callbacks.run.layer_norms",
    "callbacks.worst": "callbacks.run.worst_step",
    "callbacks.observer": "callbacks.criteria.observer",
    "callbacks.papers_networks": "callbacks.criteria.networks",
    "callbacks.certificates": "callbacks.criteria.papers.chatterjee.certificate",
    "callbacks.ball_search": "callbacks.criteria.papers.chatterjee.ball",
    "callbacks.forward_stability": "callbacks.criteria.papers.allen_zhu.states",
    "callbacks.du_evidence": "callbacks.criteria.papers.du.evidence",
    "callbacks.du_kernel": "callbacks.criteria.papers.du.kernel",
    "callbacks.du_movement": "callbacks.criteria.papers.du.movement",
    "callbacks.du_steps": "callbacks.criteria.papers.du.steps",
    "callbacks.label_projection": "callbacks.criteria.papers.du.projection",
    "callbacks.sparse_activation": "callbacks.criteria.papers.bias_ntk",
    "callbacks.phase_two_criteria": "callbacks.criteria.papers.kawaguchi_sun",
}


def _table() -> dict[str, str]:
    moved = {f"lightning_conv.{old}": f"lightning_conv.{new}" for old, new in _RENAMED.items()}
    for new, (old, names) in _SAME_NAME.items():
        for name in names.split():
            moved[f"lightning_conv.{old}.{name}" if old else f"lightning_conv.{name}"] = f"lightning_conv.{new}.{name}"
    return moved


MOVED = _table()
"""New names by old names; the submodules of a moved package move with it."""


class _Alias(Loader):
    """Loader that enters the module with the new name into ``sys.modules`` under the old one."""

    def __init__(self, new: str) -> None:
        self._new = new

    def exec_module(self, module: ModuleType) -> None:
        """Replace the empty module that the import system has created."""
        warnings.warn(f"{module.__name__} has moved to {self._new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(self._new)


class MovedFinder(MetaPathFinder):
    """Finder of modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a moved module, or None for any other name."""
        new = MOVED.get(fullname)
        if new is None:
            package, _, name = fullname.rpartition(".")
            new = f"{MOVED[package]}.{name}" if package in MOVED else None
        return None if new is None else ModuleSpec(fullname, _Alias(new), is_package=True)


def install() -> None:
    """Register the finder, once and before all others, which would load a second copy of a moved package's submodules."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedFinder())
