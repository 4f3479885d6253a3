"""The forward that reading a network begins with: which layers it calls, and what it keeps in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_conv.kernels.reading.memory import MadeBytes, SavedBytes
from lightning_conv.kernels.reading.recording import Recorder, record
from lightning_conv.networks.evaluation import Inputs, StatelessModule, sample_count

UNWATCHED = "the forward differentiates by torch.func inside"


@dataclass(frozen=True)
class FirstForward:
    """One forward of a few samples, as it was seen."""

    outputs: Tensor  # (n, C)
    recorder: Recorder
    tracked: Mapping[str, Tensor]  # parameters whose uses were recorded
    bytes: int  # that a forward with its graph takes for one sample


def first_forward(module: StatelessModule, inputs: Inputs, tracked: Mapping[str, Tensor]) -> FirstForward:
    """Pass ``inputs`` through the network, watched as closely as it allows.

    A forward that differentiates by ``torch.func`` inside refuses autograd's hooks, and a recorder does not see through the
    transforms: none of its parameters is tracked then, and what it keeps is estimated from what it makes.

    Args:
        module: the network as a function.
        inputs: a few samples.
        tracked: parameters whose uses are to be recorded.

    Raises:
        RuntimeError: the forward's own.
    """
    saved = SavedBytes(module.parameters, inputs)
    try:
        with saved:
            outputs, recorder = record(module, inputs, tracked)
    except RuntimeError as error:
        if "saved tensor" not in str(error):
            raise
        return _unwatched(module, inputs)
    for call in recorder.calls:  # a layer's input is held for the products, also where autograd needs none of it
        for tensor in call.sampled.values():
            saved.count(tensor)
    return FirstForward(outputs, recorder, tracked, -(-(saved.bytes + 3 * recorder.largest) // sample_count(inputs)))


def _unwatched(module: StatelessModule, inputs: Inputs) -> FirstForward:
    with MadeBytes() as made:
        outputs, recorder = record(module, inputs, {})
    return FirstForward(outputs, recorder, {}, -(-made.bytes // sample_count(inputs)))
