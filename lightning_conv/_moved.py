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

# Old package, new package: the modules that have moved; "old=new" where the name has changed too, "." for the top level.
_MOVES = """
. kernels: layers drift contraction spectrum
. linalg: eigenvalues lanczos estimates spectral_estimates
. losses: loss_gradient=gradient
. networks: anatomy=head float32=precision float64=precision two_phase=perturbation evaluation batch_norm wide_layer
. networks: analytic recomputation watched activation
. reporting: report markdown plots progress
callbacks callbacks.criteria: observer papers_networks=networks
callbacks callbacks.criteria.papers: sparse_activation=bias_ntk phase_two_criteria=kawaguchi_sun
callbacks callbacks.criteria.papers.allen_zhu: forward_stability=states
callbacks callbacks.criteria.papers.chatterjee: certificates=certificate ball_search=ball
callbacks callbacks.criteria.papers.du: du_evidence=evidence du_kernel=kernel du_movement=movement du_steps=steps
callbacks callbacks.criteria.papers.du: label_projection=projection
callbacks callbacks.guard: expressivity_guard=callback
callbacks callbacks.monitors: kernel_monitor=base kernel_stability lambda_min step_size spectral_decay
callbacks callbacks.run: breach=assumptions hypotheses=violations probe_kernel=measurement
callbacks callbacks.run: layer_norms worst=worst_step probe schedule
callbacks callbacks.run.data: batch data_hypotheses=samples
callbacks.guard callbacks.guard.certify: kept_folder=work_folder rank_track=certificate caveats=run_checks certificate verdict
callbacks.guard callbacks.guard.head: compared_loss=loss_check descent_bound=bounded_steps head_steps=steps
callbacks.guard callbacks.guard.head: known_outputs=cached_outputs solved_head=solved curvature descent feature_cache
callbacks.guard callbacks.guard.head: phase_two plain_steps step_rounding trunk
callbacks.guard callbacks.guard.switch: plan=moment reason=report switching=moment
callbacks.guard callbacks.run: ranks
callbacks.guard callbacks.run.data: epoch=sampling training_set
kernels kernels.engine: formed=formed_factor jacobian=per_sample_jacobian projection=kernel sums=kernel_sum collectors
kernels kernels.engine: coupled factors
kernels kernels.planning: pass_flops=pass_cost costs passes task
kernels kernels.products: precision jacobian_map pullback pushforward
kernels kernels.reading: discovery=anatomy reading_memory=memory rounding=jacobian_error selection=parameters
kernels kernels.reading: first_forward reach recording sample_axis samples sites
kernels machine: gemm memory
theory losses: loss_scale=scale squared_loss=squared objective
theory theory.papers: implicit_bias=frei threshold_networks=threshold allen_zhu chatterjee du averaged_sgd bias_ntk
theory theory.papers: clipping linear_networks linear_regions oymak
theory theory.papers.kawaguchi_sun: kawaguchi_sun=expressivity phase_two
theory theory.tools: activations ball_bounds descent hidden_states matrix_norms observation power_law running_error
theory theory.tools: smooth_mlp
theory.networks theory.networks: biased=bias_ntk leaky=frei linear=linear_networks
"""


def _table() -> dict[str, str]:
    moved = {}
    for row in _MOVES.strip().splitlines():
        packages, _, modules = row.partition(":")
        old_package, new_package = packages.split()
        for module in modules.split():
            old, _, new = module.partition("=")
            old_name = f"{old_package}.{old}".removeprefix("..")
            moved[f"lightning_conv.{old_name}"] = f"lightning_conv.{new_package}.{new or old}"
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
