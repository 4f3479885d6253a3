"""``unsteady_outputs``: whether the outputs of a network change with the rest of the batch, in the batches of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.reading.anatomy import Anatomy
from lightning_conv.kernels.reading.coupling import AT_ONCE, ENDS, require_own_outputs
from lightning_conv.kernels.reading.drawn_outputs import compared_outputs
from lightning_conv.machine.memory import allowed_memory, blocks
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.narrowing import Narrowing, coarsest
from lightning_conv.networks.stage import Stage


def unsteady_outputs(
    module: StatelessModule,
    sets: Sequence[Inputs],
    anatomy: Anatomy,
    plan: NTKPlan,
    *,
    rows: int,
    room: float,
    gradients: bool,
) -> Narrowing | None:
    """Refuse a network whose samples couple or whose forward is random, and return a change that is too small for that.

    Args:
        module: the network.
        sets: the sets of samples, each by itself.
        anatomy: what was read of it.
        plan: its batches are those of the passes.
        rows: number of samples that go through the network at once.
        room: bytes that the outputs of all samples may take; see ``room_of_outputs``.
        gradients: whether gradients are looked at as well.

    Raises:
        ValueError: the outputs change with the rest of the batch, or from one forward to the next.
    """
    return coarsest(
        [
            require_own_outputs(
                module,
                each,
                rows=rows,
                cuts=batches_of(plan, sample_count(each)),
                arranged=anatomy.arranged,
                level=anatomy.level,
                coarse=anatomy.coarse,
                gradients=gradients,
                names=anatomy.parameters,
                compared=compared_outputs(anatomy.outputs, sample_count(each), _width(module), room),
            )
            for each in sets
        ]
    )


def batches_of(plan: NTKPlan, samples: int) -> list[list[slice]]:
    """Return the batches in which the passes of a plan evaluate so many samples; torch.func takes them one by one.

    Args:
        plan: the plan.
        samples: their number.
    """
    cuts = []
    for each in plan.passes:
        tiles = [(rows, blocks(rows.stop - rows.start, each.tile)) for rows in blocks(samples, each.rows)]
        in_tiles = [slice(rows.start + t.start, rows.start + t.stop) for rows, cut in tiles for t in cut]
        cuts.append(blocks(samples, 1) if each.general else in_tiles)
    return cuts


def rows_that_fit(module: StatelessModule, anatomy: Anatomy, max_memory: float | None) -> int:
    """Return the number of samples whose forward fits into half of the memory.

    Args:
        module: the network.
        anatomy: what was read of it.
        max_memory: see ``ntk_gram``.
    """
    return max(1, allowed_memory(max_memory, module.device) // 2 // max(1, anatomy.forward_bytes))


def room_of_outputs(module: StatelessModule, max_memory: float | None) -> int:
    """Return the bytes that the outputs of all samples may take while they are compared, a quarter of the memory.

    Where they take more, as those of many positions and words may, a part of them is compared.

    Args:
        module: the network.
        max_memory: see ``ntk_gram``.
    """
    return allowed_memory(max_memory, module.device) // 4


def _width(module: StatelessModule) -> int:
    return torch.finfo(module.dtype).bits // 8


def checking_bytes(
    module: StatelessModule, anatomy: Anatomy, samples: int, rows: int, *, room: float, gradients: bool = False
) -> int:
    """Return the bytes of the outputs that ``unsteady_outputs`` holds: of all samples, twice of one batch, and what compares them.

    Args:
        module: the network.
        anatomy: what was read of it.
        samples: number of samples.
        rows: number of them in a batch.
        room: see ``unsteady_outputs``.
        gradients: whether gradients are compared: then two of them at a time, the graph of some samples, and their outputs.
    """
    width = _width(module)
    each = compared_outputs(anatomy.outputs, samples, width, room) or anatomy.outputs
    compared = 4 * min(rows * each, max(each, AT_ONCE))  # some rows at a time
    outputs = (samples * each + 2 * rows * anatomy.outputs + compared) * width
    if not gradients:
        return outputs
    few = min(samples, 2 * ENDS)
    weights = sum(module.parameters[name].numel() for name in anatomy.parameters)
    graph = few * (anatomy.forward_bytes + 2 * anatomy.outputs * width) + 2 * width * weights
    # Beside the outputs of all samples; before that the rounding is measured with a copy of the weights in float32.
    copies = 4 * sum(each.numel() for each in module.parameters.values())
    return max(outputs, samples * each * width + max(graph, copies + few * anatomy.forward_bytes))


def converted_bytes(module: StatelessModule) -> int:
    """Return the bytes of the copy of the parameters in another type than their own, which lives as long as the kernel is computed.

    Args:
        module: the network.
    """
    if module.dtype == module.model_dtype:
        return 0
    return torch.finfo(module.dtype).bits // 8 * sum(each.numel() for each in module.parameters.values())


def on_copies(stage: Stage, module: StatelessModule, look: Callable[[], Narrowing | None]) -> Narrowing | None:
    """Return what a look at the outputs finds, for which all samples pass through the network for the first time: on copies of the weights.

    A forward may write to weights or attributes on other samples than those that it was tried on. It is looked at again then, and every
    call has copies of its own from there on.

    Args:
        stage: has the model.
        module: the model as a function.
        look: the look.

    Raises:
        ValueError: the look refuses the network.
    """
    refused: ValueError | None = None
    with module.on_copies() as wrote:
        try:
            found = look()
        except ValueError as error:
            refused = error
    if stage.wrote() or wrote():
        module.before, module.copies = stage.before, module.copies or wrote()
        return look()
    if refused is not None:
        raise refused
    return found
