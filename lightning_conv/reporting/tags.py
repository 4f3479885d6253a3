"""The tags of this library's scalars: their groups, and how the name of an optimizer is written into one."""

from __future__ import annotations

GROUPS = ("convergence/", "kernel/", "loss_kernel/", "theory/", "health/", "guard/", "clipping/")
"""Beginnings of the tags of this library's callbacks."""

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
