"""``last_hidden_features``: what the trunk of a model passes to its head, the last linear layer."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress

import torch
from torch import Tensor, nn

from lightning_conv.checked import checked
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import Head, require_one_call
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.narrow_watch import NarrowWatch, narrowing_of
from lightning_conv.networks.narrowing import NarrowedError, Narrowing
from lightning_conv.networks.undisturbed import undisturbed
from lightning_conv.networks.watched import as_rows, entering, watched_forward


@checked()
def last_hidden_features(model: nn.Module, head: Head, inputs: Inputs, *, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the last hidden features h, the input of the head, shape (n, m_H), in eval mode.

    Args:
        model: the network.
        head: head of the network, see ``find_head``.
        inputs: inputs of the n samples.
        dtype: floating type of the evaluation; ``torch.float64`` computes h from a float64 copy of the model, which is
            watched for casts (``NarrowWatch``).

    Raises:
        NarrowedError: ``dtype`` is float64, and the network casts to a narrower type inside. The error has the rounded
            features, and ``certify_expressivity`` takes it from ``recompute``.
        ValueError: the forward does not call the head exactly once.
    """
    module = StatelessModule(model, dtype=dtype)
    if dtype != torch.float64:
        return features_of(module, head, inputs)
    features, narrowing = watched_features(module, head, inputs)
    if narrowing is not None:
        raise NarrowedError(features, narrowing)
    return features


def watched_features(
    module: StatelessModule, head: Head, inputs: Inputs, *, stop: bool = False, cleared: set[str] | None = None
) -> tuple[Tensor, Narrowing | None]:
    """Compute ``features_of`` and, in float64, watch the forward for casts to a narrower type.

    Args:
        module: the network; only in float64 is it watched.
        head: see ``features_of``.
        inputs: see ``features_of``.
        stop: see ``features_of``.
        cleared: see ``narrowing_of``; the same set for all batches saves forwards.

    Returns:
        The features, and where they leave float64; None: nowhere, or not watched.
    """
    if module.dtype != torch.float64:
        return features_of(module, head, inputs, stop=stop), None
    with undisturbed(module.model):
        converted = module.convert(inputs)
        watch = NarrowWatch(module, converted)
        features = features_of(module, head, converted, stop=stop, within=watch.watching())
        watch.read([features])
        return features, narrowing_of(module, converted, watch, cleared=cleared, whole=True)


class _Reached(Exception):
    """Raised by a hook when the forward has reached the layer and need not go on."""


def features_of(
    module: StatelessModule,
    head: Head,
    inputs: Inputs,
    *,
    stop: bool = False,
    within: AbstractContextManager[object] | None = None,
) -> Tensor:
    """Compute ``last_hidden_features`` with an existing copy of the network, whose parameters are then converted only once.

    Of a layer with several rows of features for each sample these follow one another, (n rows, m).

    Args:
        module: the network.
        head: a linear layer of it, the last one or an earlier one.
        inputs: inputs of the samples.
        stop: end the forward where the layer is called, to skip expensive layers after it. A second call of the layer is
            then not noticed.
        within: see ``watched_forward``.

    Raises:
        ValueError: the forward does not call the layer exactly once.
    """
    entered: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        entered.append(entering(args, kwargs))
        if stop:
            raise _Reached

    with suppress(_Reached):
        hook = head.module.register_forward_pre_hook(enter, with_kwargs=True)
        watched_forward(module, inputs, [hook], within=within)
    samples = sample_count(inputs)
    require_one_call(head.name, entered, samples, tokens=head.rows > 1)
    rows = as_rows(entered[0])
    if head.rows > 1 and len(rows) != head.rows * samples:
        raise ValueError(
            f"head: {head.name!r} has {len(rows)} rows of features for {samples} samples and had {head.rows} for each before; pad all "
            "samples to one length"
        )
    return rows
