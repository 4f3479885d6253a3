"""The laboratory: each experiment runs a theorem's own setting on real data and checks the theorem's inequalities.

An experiment is a module with a function ``run(...) -> Report``, whose arguments are its settings, and a dictionary
``SMALL`` of settings with which it takes seconds. Its name on the command line is in ``EXPERIMENTS``: `lightning-conv
lab NAME --setting value`.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_conv.recipes.usage import did_you_mean

if TYPE_CHECKING:
    from lightning_conv.recipes.lab.report import Report

OUT = Path("runs") / "lab"
"""Folder of the pages, unless `--out` names another one."""

EXPERIMENTS: dict[str, str] = {
    "allen_zhu": "Allen-Zhu, Li, Song 2019: movement, switched units and semi-smoothness at several widths",
    "averaged_sgd": "Nitanda, Suzuki 2021: averaged SGD under the NTK, the averaged iterate against the last one",
    "bias_ntk": "Yang et al. 2023: sparse activation by a constant bias, its kernel H(B), and training speed",
    "chatterjee": "Chatterjee 2022: gradient descent whose convergence is certified before its first step",
    "clipping": "delta-GClip: its three regimes and its rate, beside gradient descent and plain clipping",
    "du": "Du, Lee, Li, Wang, Zhai 2019: the limit kernels of deep networks against finite widths",
    "du_depth": "Du, Lee, Li, Wang, Zhai 2019: what depth costs, with and without skip connections",
    "du_train": "Du, Lee, Li, Wang, Zhai 2019: deep networks in training, each link of the proof measured",
    "du_two_layer": "Du, Zhai, Poczos, Singh 2019: two layers, the limit of the kernel and the rate of a whole run",
    "frei": "Frei et al. 2023; Kou et al. 2023: nearly orthogonal data, low rank after one step, equal margins",
    "health_forecast": "the forecasts of ConvergenceHealth: their error by share of the run, against the cheapest ones",
    "health_gallery": "the sentences of ConvergenceHealth: runs with a known illness, and healthy ones",
    "health_labels": "wrong labels: which an audit by the kernel finds, beside pixels, features, losses and folds",
    "health_noise": "the noise scale of ConvergenceHealth against the critical batch size of a sweep of batch sizes",
    "health_step": "the stability ratio of ConvergenceHealth: risk, causes of rises, false alarms, advised rates",
    "kawaguchi_sun": "Kawaguchi, Sun 2021: the second phase with a certified step, and its bounds",
    "linear_networks": "linear networks: balancedness is conserved, the rank of the product grows step by step",
    "linear_regions": "linear regions of ReLU networks of one variable, counted exactly, against the bound",
    "oymak": "Oymak, Soltanolkotabi 2019: the line between misfit and distance, proven for one network, broken by another",
    "random_labels": "Zhang et al. 2017, Arora et al. 2019: true and random labels, measured and predicted",
    "threshold": "Ergen et al. 2023: threshold networks, the certified convex optimum against straight-through training",
}
"""Name on the command line -> one line for the help."""

MODULES = {
    "du": "du.limit",
    "du_depth": "du.depth",
    "du_train": "du.training",
    "du_two_layer": "du.two_layer",
    "health_forecast": "health.forecast_study",
    "health_gallery": "health.gallery",
    "health_labels": "health.labels",
    "health_noise": "health.noise_study",
    "health_step": "health.step_study",
}
"""Experiments whose module in this folder is not NAME.experiment."""

ALIASES = {"gclip": "clipping", "du2layer": "du_two_layer", "du --depth": "du_depth"}
"""Former name, or name and flag -> name in ``EXPERIMENTS``; a hyphen for an underscore needs no entry."""


def overview() -> str:
    """Return the help: one line per experiment."""
    width = max(map(len, EXPERIMENTS))
    lines = [f"  {name:<{width}}  {line}" for name, line in sorted(EXPERIMENTS.items())]
    usage = (
        f"usage: lightning-conv lab NAME [--out FOLDER] [settings]\n\nThe page is written to FOLDER (default: {OUT}).\n"
    )
    return "\n".join([usage, *lines, "", "`lightning-conv lab NAME --help` has the settings of an experiment.", ""])


def resolve(name: str, words: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Resolve the name of an experiment, current or former, and its settings.

    Args:
        name: name of the experiment on the command line, such as ``du-two-layer``.
        words: settings that follow the name on the command line.

    Returns:
        The name in ``EXPERIMENTS``, and the settings without a flag that was part of a former name.

    Raises:
        ValueError: no experiment has this name; the message suggests similar ones.
    """
    slug, rest = name.replace("-", "_"), list(words)
    for flag in rest:
        if f"{slug} {flag}" in ALIASES:
            rest.remove(flag)
            return ALIASES[f"{slug} {flag}"], rest
    slug = ALIASES.get(slug, slug)
    if slug not in EXPERIMENTS:
        hint = did_you_mean(slug, EXPERIMENTS, most=3, cutoff=0.5) or ";"
        raise ValueError(f"there is no experiment {name!r}{hint} choose one of: {', '.join(sorted(EXPERIMENTS))}")
    return slug, rest


def experiment(name: str) -> "Callable[..., Report]":
    """Return the function of an experiment; its module is imported only here.

    Args:
        name: name of the experiment on the command line, current or former.

    Returns:
        The function ``run`` of its module.
    """
    slug = resolve(name)[0]
    run: Callable[..., Report] = import_module(f"{__name__}.{MODULES.get(slug, f'{slug}.experiment')}").run
    return run
