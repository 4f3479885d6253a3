"""``without_effect``: whether tensors of the module that moved enter neither features nor loss, as an average of weights does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_conv.callbacks.guard.certify.copies import frozen_twin, last_moment
from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.callbacks.run.call import Seen, StepCall
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.networks.undisturbed import without_fused_attention

POISONS = (float("nan"), 1e30, -1e30)
WHOLE = (0, 10**6, -(10**6))  # of whole numbers, such as counters
FEW = 16  # samples from each end of the training set


def without_effect(view: GuardView, names: Sequence[str]) -> bool:
    """Return whether features and loss of the training step stay bit for bit the same when tensors are overwritten.

    They are filled with NaN and huge numbers; whole numbers also with zero.

    The step runs on copies, on samples from both ends of the training set, at the present step and at the run's last one.

    Args:
        view: The run. All ranks get the same.
        names: Parameters and buffers of the module. Where one of them holds truth values or complex numbers the answer is no.

    Cost: eight training steps of 16 samples, for each of two copies of the weights.
    """
    return all(view.ranks.gather(lambda: _mine(view, names)))


def _mine(view: GuardView, names: Sequence[str]) -> bool:
    with attempted(Exception), without_fused_attention():  # the step is any code of the user's
        return all(_has_none(view, names, *moment) for moment in ((), last_moment(view.trainer)))
    return False


def _has_none(view: GuardView, names: Sequence[str], *moment: int) -> bool:
    twin = frozen_twin(view, *moment)
    tensors = {**dict(twin.module.named_parameters()), **dict(twin.module.named_buffers())}
    if not all(name in tensors and _is_real(tensors[name]) for name in names):
        return False
    size, few = view.data.size, min(FEW, view.data.size)
    batches = [next(view.data.batches(start, start + few))[1] for start in (0, size - few)]

    def run() -> list[Tensor]:
        seen: list[Seen] = [StepCall(twin, view.head_name, batch, k).observe() for k, batch in enumerate(batches)]
        return [each.detach() for made in seen for each in (made.loss, made.features)]

    before = run()
    if not all(map(torch.equal, before, run())):  # the step counts its calls, say
        return False
    for poison, number in zip(POISONS, WHOLE, strict=True):
        with torch.no_grad():
            for name in names:
                tensors[name].fill_(poison if tensors[name].is_floating_point() else number)
        if not all(map(torch.equal, before, run())):
            return False
    return True


def _is_real(tensor: Tensor) -> bool:
    return not tensor.is_complex() and tensor.dtype not in (torch.bool, torch.int8, torch.uint8)
