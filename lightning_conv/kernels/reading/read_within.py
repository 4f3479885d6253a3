"""``reading_samples``, ``read_within``: on which samples a network is read for a kernel, and whether there is room for it."""

from __future__ import annotations

from lightning_conv.kernels.reading.anatomy import READ_SAMPLES, Anatomy, read_network
from lightning_conv.kernels.reading.memory import reading_bytes
from lightning_conv.kernels.reading.samples import joined
from lightning_conv.machine.memory import allowed_memory, mebibytes
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take


def reading_samples(inputs: Inputs, others: Inputs | None) -> Inputs:
    """Return the samples on which a network is read: those of the rows of a kernel.

    If they are few, columns are added, since one sample does not tell which dimension contains it.

    Args:
        inputs: the samples of the rows.
        others: those of the columns; None: the same.
    """
    if others is None or sample_count(inputs) >= READ_SAMPLES:
        return inputs
    both = joined(inputs, take(others, slice(0, READ_SAMPLES)))
    return max(inputs, others, key=sample_count) if both is None else both


def read_within(
    module: StatelessModule,
    names: tuple[str, ...],
    inputs: Inputs,
    *,
    rules: bool,
    couples: bool,
    by_gradients: bool,
    max_memory: float | None,
) -> Anatomy:
    """Read a network on a few samples; on all of them where samples couple.

    Args:
        module: the network.
        names: of the parameters.
        inputs: see ``reading_samples``.
        rules: see ``read_network``.
        couples: whether samples couple.
        by_gradients: see ``read_network``.
        max_memory: see ``ntk_gram``.

    Raises:
        MemoryError: reading takes more than ``max_memory``.
    """
    needed = reading_bytes(module, names)
    allowed = allowed_memory(max_memory, module.device)
    if needed > allowed:
        raise MemoryError(
            f"max_memory: reading the network (its gradients and a copy in another precision) takes {mebibytes(needed)} of the allowed "
            f"{mebibytes(allowed)}; allow more, or choose fewer parameters"
        )
    samples = sample_count(inputs) if couples else READ_SAMPLES
    return read_network(module, names, inputs, rules=rules, samples=samples, by_gradients=by_gradients)
