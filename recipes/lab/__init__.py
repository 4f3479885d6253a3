"""The laboratory: a file a theorem, each running the theorem's own setting on real data and judging its inequalities.

An experiment is a module with a function ``run(...) -> Report`` whose arguments are its settings. Its name on the
command line is in ``EXPERIMENTS``: `lightning-conv lab NAME --setting value`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_conv.recipes.lab.report import Report

EXPERIMENTS: dict[str, tuple[str, str]] = {
    "averaged-sgd": (
        "averaged_sgd.experiment",
        "averaged SGD under the NTK: spectrum, degrees of freedom, averaged against last iterate",
    ),
    "chatterjee": ("chatterjee.experiment", "a descent that is certified before its first step (Chatterjee 2022)"),
    "gclip": (
        "clipping.experiment",
        "delta-GClip: its three regimes and its rate, beside gradient descent and plain clipping",
    ),
    "kawaguchi-sun": (
        "kawaguchi_sun.experiment",
        "the second phase with a certified step and its bounds (Kawaguchi & Sun 2021)",
    ),
    "oymak": (
        "oymak.experiment",
        "the line between misfit and distance, proven and broken (Oymak & Soltanolkotabi 2019)",
    ),
    "threshold": (
        "threshold.experiment",
        "Threshold networks: the convex optimum, certified, against straight-through training",
    ),
    "frei": (
        "frei.experiment",
        "Frei et al. 2023; Kou et al. 2023: nearly orthogonal data, low rank after one step, equal margins",
    ),
    "linear-networks": (
        "linear_networks.experiment",
        "linear networks: balancedness is conserved, the rank of the product grows step by step",
    ),
    "linear-regions": (
        "linear_regions.experiment",
        "linear regions of ReLU networks of one variable, counted exactly, against the bound",
    ),
    "bias-ntk": (
        "bias_ntk.experiment",
        "Yang et al. 2023: sparse activation by a constant bias, its kernel H(B), and training speed",
    ),
    "allen-zhu": (
        "allen_zhu.experiment",
        "Allen-Zhu, Li, Song 2019: movement, switched units and semi-smoothness at several widths",
    ),
    "du": (
        "du.limit",
        "Du, Lee, Li, Wang, Zhai 2019: deep limit kernels against finite widths; --depth: what depth costs",
    ),
    "du-train": (
        "du.training",
        "Du, Lee, Li, Wang, Zhai 2019: deep networks along training, each link of the proof measured",
    ),
    "du2layer": (
        "du.two_layer",
        "Du, Zhai, Poczos, Singh 2019: two layers, the kernel's limit and the rate along a run",
    ),
    "random-labels": (
        "random_labels.experiment",
        "Zhang et al. 2017, Arora et al. 2019: true and random labels, measured and predicted",
    ),
}
"""Name on the command line -> (module in this folder, one line for the help)."""


def experiment(name: str) -> "Callable[..., Report]":
    """The function behind a name of ``EXPERIMENTS``; nothing heavy is imported before."""
    run: Callable[..., Report] = import_module(f"{__name__}.{EXPERIMENTS[name][0]}").run
    return run
