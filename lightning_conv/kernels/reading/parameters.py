"""The parameters by which a kernel differentiates, chosen by name or pattern, or as those that require gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_conv.arguments import described
from lightning_conv.networks.evaluation import StatelessModule


def parameter_names(module: StatelessModule, asked: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the names of the chosen parameters, in the order of the model.

    Args:
        module: the model.
        asked: names, or shell patterns such as ``"encoder.*"`` or ``"*.bias"`` (``*`` also matches dots); a tied weight has
            several names and is found by each. None or ``"requires_grad"``: all that require gradients, as in a model that
            is frozen for LoRA.

    Raises:
        TypeError: ``asked`` has something else than strings.
        ValueError: ``asked`` is empty, a name or pattern matches nothing, or no parameter requires a gradient.
    """
    if asked is None or asked == "requires_grad":
        if not module.trainable:
            raise ValueError(
                "model: no parameter has requires_grad, so its tangent kernel is empty; unfreeze the parameters that are meant"
            )
        return module.trainable
    return matching_names(module.aliases, asked)


def matching_names(known: Mapping[str, str], asked: Sequence[str] | str) -> tuple[str, ...]:
    """Return the parameters of which a name matches, each once under its first name, in the order of the model.

    Args:
        known: every name of a parameter -> its first name, see ``aliases_of``.
        asked: names or shell patterns, see ``parameter_names``.

    Raises:
        TypeError: ``asked`` has something else than strings.
        ValueError: ``asked`` is empty, or a name or pattern matches nothing.
    """
    patterns = [asked] if isinstance(asked, str) else list(asked) if isinstance(asked, Iterable) else [asked]
    if not all(isinstance(each, str) for each in patterns):
        raise TypeError(f"parameters: {described(asked)}; need names of parameters, or patterns such as 'encoder.*'")
    matches = {pattern: {name for name in known if _matches(name, pattern)} for pattern in patterns}
    unmatched = [pattern for pattern, names in matches.items() if not names]
    if unmatched or not patterns:
        raise ValueError(
            f"parameters: {unmatched or 'an empty list'}; need names or patterns of parameters of the model ({', '.join(known)})"
        )
    chosen = {known[name] for name in set().union(*matches.values())}
    return tuple(name for name in dict.fromkeys(known.values()) if name in chosen)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)
