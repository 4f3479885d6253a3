"""``features_of_step``: whether the training step computes the features that the network shows when it is evaluated by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.copies import frozen_twin, in_eval_mode, last_moment
from lightning_conv.callbacks.guard.certify.features_compared import other_features
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.call import StepCall
from lightning_conv.callbacks.run.isolated import isolated, seed_all
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head_probe import same
from lightning_conv.networks.hidden_features import features_of
from lightning_conv.networks.inputs import Inputs, map_inputs, sample_count

SEEDS = 16  # draws of random numbers that a step may make: what happens in one step of six is noticed nine times in ten
# Units of float64 rounding by which the features of a sample may differ among other samples: products are reordered.
NEIGHBOURS = 10**5
DRAWN = " (with other random numbers)"


def features_of_step(view: GuardView, inputs: Inputs, batch: Any, number: int) -> str:
    """Return whether the training step of phase 2 computes other features than the network as it is evaluated here.

    Args:
        view: The run.
        inputs: What of the batch enters the network.
        batch: The batch.
        number: Its number in the epoch.
    """
    here = features_of(StatelessModule(view.network), view.head, inputs).double()
    exact = features_of(StatelessModule(view.network, dtype=torch.float64), view.head, inputs)
    if said := _coupled(view, inputs, exact):
        return said
    steady: Tensor | None = None
    for when, seen in _of_steps(view, batch, number):
        if said := other_features(seen, exact, (here - exact).abs().amax(0)):
            return said + when
        if when == DRAWN:
            steady = seen if steady is None else steady
            if not same(steady, seen):
                return (
                    "the features of the training step are random: they differ, if by little, with the random numbers"
                )
    return ""


def _of_steps(view: GuardView, batch: Any, number: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the features that the step computes now, once the trunk is frozen, at the last step, and with other random numbers."""

    def seen(twin: Twin) -> Tensor:
        return StepCall(twin, view.head_name, batch, number).observe().features

    yield "", seen(in_eval_mode(view))
    twin = frozen_twin(view)
    yield " (once the trunk is frozen)", seen(twin)
    step, epoch = last_moment(view.trainer)
    yield f" (at step {step})", seen(in_eval_mode(view, step, epoch))
    with isolated():
        for seed in range(SEEDS):
            seed_all(seed)
            yield DRAWN, seen(twin)


def _coupled(view: GuardView, inputs: Inputs, exact: Tensor) -> str:
    """Return whether the features of a sample depend on its neighbours in the batch, on its place, or on random numbers.

    They are computed anew for all but the first sample in the reverse order, and for each sample twice in a batch of its own (one alone
    may lose its axis in a squeeze), with other random numbers each time.
    """
    n, network = sample_count(inputs), StatelessModule(view.network, dtype=torch.float64)
    each = exact.reshape(n, -1, exact.shape[-1])  # a sample may have several rows
    allowed = NEIGHBOURS * torch.finfo(exact.dtype).eps * float(exact.abs().max())
    for seed, chosen in enumerate([[*reversed(range(1, n))] if n > 2 else [0, 0], *([k, k] for k in range(n))]):
        some = map_inputs(partial(_rows, chosen=chosen), inputs)
        with isolated():
            seed_all(seed)
            apart = float((features_of(network, view.head, some) - each[chosen].flatten(0, 1)).abs().max())
        if not apart <= allowed:
            return (
                f"the features of a sample depend on the other samples of its batch, or on random numbers: {apart:.2g} apart, where "
                f"rounding explains {allowed:.1g}"
            )
    return ""


def _rows(tensor: Tensor, chosen: list[int]) -> Tensor:
    return tensor[chosen]
