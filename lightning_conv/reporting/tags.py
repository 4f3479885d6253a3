"""The tags of this library's scalars: their groups, and how the name of an optimizer is written into one."""

from __future__ import annotations

GROUPS = ("convergence/", "kernel/", "loss_kernel/", "theory/", "health/", "guard/", "clipping/")
"""Beginnings of the tags of this library's callbacks."""

REPEATS = frozenset(
    {
        "convergence/lambda_min",
        "convergence/kernel_change",
        "convergence/phase",
        "convergence/gap",
        "kernel/spectral_change_over_lambda_min",
        "loss_kernel/spectral_change_over_lambda_min",
    }
)
"""Values that another tag has already, or has but for a constant factor: they are in ``trainer.callback_metrics`` and in no logger."""

EQUALS = {
    "guard/loss": "guard/gap",
    "guard/sigma_min_lower": "guard/sigma_min",
    "theory/sigma_min_lower": "theory/sigma_min",
    "theory/pl_infimum": "theory/pl_ratio",
    "theory/gradient_norm": "loss_kernel/gradient_norm",
    "theory/layer_distance_spectral": "theory/layer_distance_frobenius",
    "theory/layer_distance_spectral_relative": "theory/layer_distance_frobenius_relative",
    "theory/layer_stable_rank_max": "theory/layer_stable_rank_min",
    "health/regime": "kernel/relative_frobenius_change",
    "health/lambda_min_bound": "kernel/lambda_min_bound",
}
"""Values that are those of another tag in many runs, by their tag; where they are, TensorBoard gets the other one alone."""

LOSS = "loss"
"""Name of the losses of the training steps, which no logger has under this name."""


def tag_of_network(name: str, optimizer: str) -> str:
    """Return a tag with the name of the optimizer behind its group; an empty name changes nothing.

    Args:
        name: The tag in a run with one optimizer.
        optimizer: Name of the optimizer whose network is measured.

    Example:
        >>> tag_of_network("kernel/lambda_min", "generator")
        'kernel/generator/lambda_min'
    """
    group, _, rest = name.partition("/")
    return f"{group}/{optimizer}/{rest}" if optimizer and rest else name


def tag_of_one(tag: str) -> tuple[str, str]:
    """Return a tag as it is in a run with one optimizer, and the name of the optimizer in it; inverse of ``tag_of_network``.

    Args:
        tag: The tag.

    Example:
        >>> tag_of_one("kernel/generator/lambda_min")
        ('kernel/lambda_min', 'generator')
        >>> tag_of_one("kernel/lambda_min")
        ('kernel/lambda_min', '')
    """
    group, _, rest = tag.partition("/")
    optimizer, _, name = rest.rpartition("/")
    return (f"{group}/{name}", optimizer) if f"{group}/" in GROUPS else (tag, "")
