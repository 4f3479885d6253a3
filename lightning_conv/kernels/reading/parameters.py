"""Which parameters a kernel is over: names, globs, or those that require gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from lightning_conv.networks.evaluation import StatelessModule


def parameter_names(module: StatelessModule, asked: Sequence[str] | str | None) -> tuple[str, ...]:
    """Names of the parameters that are asked for, in the model's order.

    Args:
        module: the model.
        asked: names, or shell patterns such as ``"encoder.*"`` or ``"*.bias"`` (``*`` also matches dots); None or
            ``"requires_grad"``: all that require gradients, as after freezing a model for LoRA.

    Raises:
        ValueError: nothing is asked for, a name or pattern matches nothing, or nothing requires a gradient.
    """
    if asked is None or asked == "requires_grad":
        if not module.trainable:
            raise ValueError(
                "model: no parameter has requires_grad, so its tangent kernel is empty; unfreeze what is meant"
            )
        return module.trainable
    return matching_names(module.parameters, asked)


def matching_names(known: Iterable[str], asked: Sequence[str] | str) -> tuple[str, ...]:
    """Those of the ``known`` names that are asked for, in their order.

    Raises:
        ValueError: nothing is asked for, or a name or pattern matches nothing.
    """
    known = list(known)
    patterns = [asked] if isinstance(asked, str) else list(asked)
    matches = {pattern: {name for name in known if _matches(name, pattern)} for pattern in patterns}
    unmatched = [pattern for pattern, names in matches.items() if not names]
    if unmatched or not patterns:
        raise ValueError(
            f"parameters: {unmatched or 'an empty list'}; need names or patterns of parameters of the model ({', '.join(known)})"
        )
    chosen = set().union(*matches.values())
    return tuple(name for name in known if name in chosen)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)
