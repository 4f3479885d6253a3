"""The outputs of each sample by itself, all in one pass, by ``torch.func.vmap``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_conv.machine.memory import blocks
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, map_inputs, sample_count, take


def outputs_alone(
    module: StatelessModule, inputs: Inputs, rows: int, arranged: Callable[[Inputs], Inputs]
) -> Iterator[tuple[slice, Tensor]]:
    """Yield samples with their outputs, each evaluated as a batch of one.

    The transform lets a forward see one sample and nothing of the others, whatever it does with its batch, and computes all of them by
    products of ordinary size.

    Args:
        module: the network, whose forward writes to nothing.
        inputs: its samples.
        rows: number of samples whose forward with its graph fits into the memory.
        arranged: layout in which samples are passed.

    Raises:
        Exception: the forward cannot be transformed: it draws random numbers, looks at numbers, or has an operator without a rule.

    Cost: one forward of the samples.
    """

    def outputs_of_one(sample: Inputs) -> Tensor:
        return module.outputs({}, map_inputs(lambda each: each.unsqueeze(0), sample))[0]

    # Attention without its fused operator holds the weights of all pairs of positions.
    rows = max(1, rows // 4)
    transformed = torch.func.vmap(outputs_of_one, randomness="error")
    for cut in blocks(sample_count(inputs), rows):
        with _by_rules():
            found = transformed(arranged(take(inputs, cut)))
        yield cut, found.detach()


def change_alone(
    change: Callable[[Tensor, Tensor], float],
    module: StatelessModule,
    inputs: Inputs,
    rows: int,
    arranged: Callable[[Inputs], Inputs],
) -> float:
    """Return the largest change of the outputs of samples that are evaluated by themselves; infinity: they cannot be.

    Args:
        change: what it is, given numbers of samples and their outputs.
        module: see ``outputs_alone``.
        inputs: see ``outputs_alone``.
        rows: see ``outputs_alone``.
        arranged: see ``outputs_alone``.
    """
    if not module.transforms or module.before is not None or module.copies:  # the forward writes to something
        return float("inf")
    changes = [0.0]
    try:
        for cut, found in outputs_alone(module, inputs, rows, arranged):
            changes.append(change(torch.arange(cut.start, cut.stop), found))
    except Exception:  # of any kind: the forward is the user's, and was not written for this
        return float("inf")
    return max(changes)


@contextmanager
def _by_rules() -> Iterator[None]:
    """Let what has no rule fail, which would be evaluated sample by sample, and attention be computed by operators that have one."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("error", message=".*batching rule")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
