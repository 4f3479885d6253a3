"""``compare_mixed``: whether the loss is a sum over the samples in batches as the run draws them, for losses that have no name."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_conv.callbacks.guard.certify.copies import frozen_twin
from lightning_conv.callbacks.guard.certify.gradients_compared import depends_on_the_batch
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.call import StepCall
from lightning_conv.callbacks.run.isolated import isolated, seed_all
from lightning_conv.losses.of_outputs import ULPS, Point, difference_across, evaluate
from lightning_conv.losses.slope import wrong_slope

SEEDS = 2  # other random numbers with which a batch is evaluated again


def compare_mixed(view: GuardView) -> str:
    r"""Return how the loss of the training step is no sum of fixed losses of the samples; empty if it is, as far as it was tried.

    A term between two samples acts where both are in a batch, and a data set that is sorted shows them together in no batch of its own
    order. So batches of the run's size are drawn as the run draws them, at random where it shuffles, until every sample was in one. With
    outputs u' at random, and each batch divided at random into two halves,

    - :math:`\phi(u) - \phi(a, b') - \phi(a', b) + \phi(u') = 0`, for the present outputs u = (a, b): no coupling
    - the loss at u' is the same with other random numbers
    - its gradient at u' by the outputs of one half is that of a batch of this half alone, up to one factor: targets and weights of a
      sample do not depend on the others
    - its gradient is that of its value (``wrong_slope``)

    each up to 64 units of rounding.

    Args:
        view: The run. All ranks get the same.

    Cost: about eight training steps for each batch, without a backward pass through the trunk.
    """
    return next((said for found in view.ranks.gather(lambda: _mine(view)) for said in found if said), "")


def _mine(view: GuardView) -> list[str]:
    twin = frozen_twin(view)
    for number, chosen in enumerate(_batches(view)):
        whole = StepCall(twin, view.head_name, view.data.batch_of(chosen), number)
        first = chosen[: len(chosen) // 2]
        half = StepCall(twin, view.head_name, view.data.batch_of(first), number) if first else None
        if said := _departure(whole, half, len(chosen), number):
            return [said]
    return [""]


def _batches(view: GuardView) -> Iterator[list[int]]:
    data = view.data
    mine = data.ranks.share(0, data.size)
    order = torch.randperm(data.size, generator=torch.Generator().manual_seed(0)).tolist()
    order = list(range(data.size)) if data.sampling.repeats else order
    for start in range(mine.start, mine.stop, data.sampling.batch_size):
        yield order[start : min(start + data.sampling.batch_size, mine.stop)]


def _departure(whole: StepCall, half: StepCall | None, samples: int, seed: int) -> str:
    made = whole.observe()
    present = Point.of(made.outputs, made.loss, torch.autograd.grad(made.loss, made.outputs)[0])
    generator = torch.Generator().manual_seed(seed)
    size = max(1.0, float(present.outputs.double().square().mean().sqrt()))
    drawn = torch.randn(present.outputs.shape, generator=generator, dtype=torch.float64).mul(size)
    there = evaluate(whole, drawn.to(present.outputs))
    if not (present.finite and there.finite):
        return ""
    each = len(drawn) // samples  # a sample may have several rows
    some = torch.randperm(samples, generator=generator)[: (samples + 1) // 2]
    rows = torch.arange(len(drawn)).reshape(samples, each)[some].flatten()
    if samples > 1 and (apart := difference_across(whole, present, there, rows)) > 0:
        return f"the loss couples the samples of a batch (what one half adds depends on the other half, by {apart:.2g})"
    if not _repeats(whole, there):
        return "the loss of the training step is random: it differs, with the same outputs, with the random numbers"
    first = torch.arange(each * (samples // 2))
    if half is not None and (said := depends_on_the_batch(there, first, half)):
        return said
    said = wrong_slope(whole, present.outputs, seed)
    return said and f"the backward pass of the training step does not give the gradient of its loss ({said})"


def _repeats(call: StepCall, there: Point) -> bool:
    with isolated():
        for seed in range(1, SEEDS + 1):
            seed_all(seed)
            if abs(float(call(there.outputs).detach()) - there.value) > ULPS * there.unit * there.size:
                return False
    return True


def is_named(view: GuardView) -> bool:
    """Tell whether the loss of every step is compared with one of torch's, so that nothing else needs to be known of it.

    Args:
        view: The run.
    """
    loss = view.loss
    return loss.loss_fn is not None and view.head.last and loss.kind.kind not in ("other", "unknown")
