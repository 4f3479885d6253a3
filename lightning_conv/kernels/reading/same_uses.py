"""``require_same_uses``: whether a batch uses the parameters with a rule as the samples did on which the network was read."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.kernels.reading.anatomy import Anatomy
from lightning_conv.kernels.reading.recording import Recorder, layer_gradients, signature_of


def require_same_uses(anatomy: Anatomy, outputs: Tensor, recorder: Recorder) -> None:
    """Refuse a batch that uses parameters with a rule in another way than the samples that were read.

    Args:
        anatomy: what was read.
        outputs: those of the batch, with their graph, which is kept.
        recorder: the calls of the batch.

    Raises:
        ValueError: the batch calls other layers, or a parameter with a rule has a use that no rule covers.
    """
    calls = recorder.calls
    hint = "its control flow depends on the data; use engine='jacobian', which goes sample by sample"
    if signature_of(calls) != anatomy.signature:
        raise ValueError(
            f"model: called {len(calls)} layers on one batch and {len(anatomy.signature)} on another, or different ones; {hint}"
        )
    ruled = {name for site in anatomy.sites for name in site.names}
    used = {use.call for site in anatomy.sites for use in site.uses}
    # Calls with parameters that have a rule, on which the outputs did not depend.
    idle = [k for k, names in enumerate(anatomy.signature) if k not in used and ruled & set(names)]
    late = recorder.elsewhere & ruled
    gradients = layer_gradients(outputs, torch.ones_like(outputs), [calls[index] for index in idle], keep=True)
    for index, gradient in zip(idle, gradients, strict=True):
        late |= set() if gradient is None else ruled & set(calls[index].names.values())
    if late:
        raise ValueError(
            f"model: {', '.join(sorted(late))} had fewer uses on the first samples than on others, since {hint}"
        )
