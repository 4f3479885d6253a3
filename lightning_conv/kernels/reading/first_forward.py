"""The first forward pass of reading a network, which shows the layers that it calls and the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_conv.kernels.reading.memory import MadeBytes, SavedBytes
from lightning_conv.kernels.reading.recording import Recorder, record
from lightning_conv.machine.clock import now
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count

UNWATCHED = "the forward differentiates by torch.func inside"


@dataclass(frozen=True)
class FirstForward:
    """One recorded forward pass of a few samples."""

    outputs: Tensor  # (n, C)
    recorder: Recorder
    tracked: Mapping[str, Tensor]  # parameters whose uses were recorded
    bytes: int  # bytes of a forward with its graph, for one sample
    seconds: float  # that it took, for one sample


def first_forward(module: StatelessModule, inputs: Inputs, tracked: Mapping[str, Tensor]) -> FirstForward:
    """Pass ``inputs`` through the network, and record as much as it allows.

    A forward that uses ``torch.func`` inside refuses the hooks of autograd, and its transforms hide the layers from a
    recorder. None of its parameters is tracked then, and its memory is estimated from all tensors that it creates.

    Args:
        module: the network as a function.
        inputs: a few samples.
        tracked: parameters whose uses are recorded.

    Raises:
        RuntimeError: the forward itself raises it.
    """
    saved = SavedBytes(module.parameters, inputs)
    start, samples = now(module.device), sample_count(inputs)
    try:
        with saved:
            outputs, recorder = record(module, inputs, tracked)
    except RuntimeError as error:
        if "saved tensor" not in str(error):
            raise
        return _unwatched(module, inputs)
    seconds = (now(module.device) - start) / samples
    for call in recorder.calls:  # layer inputs are kept for the products, even those that autograd does not need
        for tensor in call.sampled.values():
            saved.count(tensor)
    return FirstForward(outputs, recorder, tracked, -(-(saved.bytes + 3 * recorder.largest) // samples), seconds)


def _unwatched(module: StatelessModule, inputs: Inputs) -> FirstForward:
    start, samples = now(module.device), sample_count(inputs)
    with MadeBytes() as made:
        outputs, recorder = record(module, inputs, {})
    seconds = (now(module.device) - start) / samples
    return FirstForward(outputs, recorder, {}, -(-made.bytes // samples), seconds)
