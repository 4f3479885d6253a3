"""``subset_parameters``: the parameters whose kernel bounds the whole one, by name, by pattern, or those of the last layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import TypeAlias

from torch import nn

from lightning_conv.kernels.reading.last_layers import last_layers
from lightning_conv.kernels.reading.parameters import matching_names
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.parameter_names import aliases_of
from lightning_conv.networks.stage import staged
from lightning_conv.networks.undisturbed import undisturbed

Subset: TypeAlias = str | Sequence[str]
"""``LAST_BLOCK``, a name or pattern of parameters, or several."""

LAST_BLOCK = "last block"

CLOSE = 0.7
"""Similarity from which on a pattern that matches nothing is taken for a misspelt ``LAST_BLOCK``."""

FEW = 2
"""Samples with which the order of the layers is found out."""


def subset_parameters(
    model: nn.Module,
    inputs: Inputs,
    asked: Subset,
    *,
    among: Collection[str] | None = None,
    one_row: bool = False,
    batch_norm: BatchNormMode = "eval",
    argument: str = "parameters",
) -> tuple[str, ...]:
    """Return the names of the chosen parameters, in the order of the model.

    ``"last block"``: the layers that are called last, as many as have together twice as many numbers as there are rows in the kernel of
    all outputs (n C), or half of all numbers: with fewer than n C the kernel would be singular. So it is the last linear layer alone where
    that is wider than about twice the number of samples, as in ResNet-18, and the end of the last block of a transformer with its head.

    Args:
        model: the network, unchanged afterwards.
        inputs: see ``ntk_gram``.
        asked: names, patterns, or ``"last block"``.
        among: names of the parameters that the whole kernel is over; None: those that require gradients.
        one_row: whether a sample has one row in the kernel of all outputs, since they are contracted.
        batch_norm: see ``ntk_gram``.
        argument: name of the argument that errors name.

    Raises:
        TypeError: see ``require_subset``.
        ValueError: a name or pattern matches none of these parameters, or there are none; see ``require_subset``.

    Cost: none for names; a few forward passes of two samples for ``"last block"``.
    """
    patterns = require_subset(asked, argument=argument)
    aliases = aliases_of(model)
    trained = {name for name, each in model.named_parameters() if each.requires_grad} if among is None else set(among)
    known = {name: first for name, first in aliases.items() if first in trained}
    if not known:
        raise ValueError(f"{argument}: the model has no trainable parameter, so there is no kernel to bound")
    if patterns != [LAST_BLOCK]:
        for pattern in patterns:
            _require_match(pattern, known, aliases, argument)
        return matching_names(known, patterns)
    few, samples = take(inputs, slice(0, FEW)), sample_count(inputs)
    with undisturbed(model), staged(model, few) as stage:
        module = stage.stateless(batch_norm=batch_norm, statistics_of=few)
        return last_layers(
            module, module.convert(few), set(known.values()), rows=lambda outputs: samples * (1 if one_row else outputs)
        )


def require_subset(asked: object, *, argument: str = "parameters") -> list[str]:
    """Return the names and patterns as a list.

    Args:
        asked: what was given.
        argument: name of the argument that errors name.

    Raises:
        TypeError: it is no string and no sequence of strings.
        ValueError: it is empty, or ``"last block"`` stands beside others, or is written in capitals.
    """
    wanted = f"need {LAST_BLOCK!r}, a pattern of parameters such as '*lora_*', or a list of patterns"
    if not isinstance(asked, str | Sequence) or isinstance(asked, bytes):
        raise TypeError(f"{argument}: got {asked!r} ({type(asked).__name__}); {wanted}")
    patterns = [asked] if isinstance(asked, str) else list(asked)
    wrong = [each for each in patterns if not isinstance(each, str)]
    if wrong:
        raise TypeError(f"{argument}: {wrong[0]!r} ({type(wrong[0]).__name__}) is no pattern; {wanted}")
    if not patterns or not all(patterns):
        raise ValueError(f"{argument}: {asked!r} names nothing; {wanted}")
    close = [each for each in patterns if each != LAST_BLOCK and each.strip().casefold() == LAST_BLOCK]
    if close:
        raise ValueError(f"{argument}: {close[0]!r}; did you mean {LAST_BLOCK!r}, in small letters?")
    if LAST_BLOCK in patterns and len(patterns) > 1:
        raise ValueError(f"{argument}: {LAST_BLOCK!r} stands alone, and not in a list with patterns; {wanted}")
    return patterns


def _require_match(pattern: str, known: dict[str, str], aliases: dict[str, str], argument: str) -> None:
    try:
        matching_names(known, pattern)
    except ValueError as error:
        frozen = [name for name in aliases if name not in known]
        if frozen and _matches_any(pattern, frozen):
            why = "matches only parameters that the kernel is not over, such as frozen ones"
        else:
            why = f"matches none of the {len(known)} parameters that the kernel is over"
        closest = get_close_matches(pattern.replace("*", ""), known, n=1, cutoff=0.0)[0]
        meant = get_close_matches(pattern.casefold(), [LAST_BLOCK], cutoff=CLOSE)
        also = f"; {LAST_BLOCK!r} stands for the last layers" if meant else ""
        raise ValueError(
            f"{argument}: {pattern!r} {why}; the closest is {closest!r}, and * stands for anything{also}"
        ) from error


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    try:
        return bool(matching_names({name: name for name in names}, pattern))
    except ValueError:
        return False
