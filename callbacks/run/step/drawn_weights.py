"""``draw_weights``: other weights in a copy of the module."""

from __future__ import annotations

import torch

from lightning_conv.callbacks.run.twin import Twin

DRAWN = 2**16
"""Random numbers that are drawn for a tensor; a larger one repeats them, as drawing 10 million takes longer than a pass of the network."""


@torch.no_grad()
def draw_weights(twin: Twin, seed: int, size: float) -> None:
    """Overwrite the weights that the run trains, in the copy, by random numbers of the size of each tensor times ``size``.

    Args:
        twin: The copy.
        seed: Seed of the numbers.
        size: Factor; tensors that are zero are drawn at this size itself.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in twin.module.named_parameters():
        if name not in twin.trained:  # a teacher, say
            continue
        if parameter.is_floating_point() or parameter.is_complex():
            values = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            scale = float(torch.linalg.vector_norm(values)) / max(1, parameter.numel()) ** 0.5
            count = parameter.numel()
            drawn = torch.randn(min(count, DRAWN), generator=generator)
            if count > DRAWN:
                drawn = drawn.repeat(-(-count // DRAWN))[:count]
            parameter.copy_(
                (drawn.view(parameter.shape) * (size * (scale if 0 < scale < float("inf") else 1.0))).to(parameter)
            )
