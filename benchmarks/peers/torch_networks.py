"""The network of a case as a torch module, and tiles and products of Jacobians, which the peers on PyTorch share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from networks import build
from torch import Tensor, nn

BUDGET = 4 * 2**30
"""Bytes for the Jacobians that are in memory at one time."""


def load(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str) -> tuple[nn.Module, Tensor]:
    """Build the network of ``case`` with the weights in ``arrays``, in eval mode, and its inputs."""
    model = build(case["description"])
    model.load_state_dict(
        {name.removeprefix("state."): torch.as_tensor(a) for name, a in arrays.items() if name.startswith("state.")}
    )
    kind = getattr(torch, dtype)
    # Some peers make buffers of the default type, which would silently be float32 inside a float64 computation.
    torch.set_default_dtype(kind)
    return model.to(kind).eval(), torch.as_tensor(arrays["inputs"]).to(kind)


def reduce_full(full: Tensor, outputs: str) -> Tensor:
    """Reshape (n, C, n, C) to the (n C, n C) matrix, or take its (n, n) trace."""
    n, c = full.shape[:2]
    return full.diagonal(dim1=1, dim2=3).sum(-1) if outputs == "trace" else full.reshape(n * c, n * c)


def blocked_gram(
    jacobian: Callable[[slice, int | None], Sequence[Tensor]],
    *,
    samples: int,
    classes: int,
    parameters: int,
    outputs: str,
    itemsize: int,
    loop: bool,
) -> Tensor:
    """Compute the kernel from Jacobian tiles, (n, n) or (n C, n C), which are recomputed if ``BUDGET`` requires it.

    Args:
        jacobian: (tile of samples, output or None for all) -> one (t, C or 1, p) tensor per parameter.
        samples: n.
        classes: C.
        parameters: P.
        outputs: "trace" or "full".
        itemsize: bytes per number.
        loop: for the trace, take one output at a time, which allows tiles C times as long.

    Returns:
        The matrix in the type of the Jacobians.

    Raises:
        MemoryError: the Jacobian rows of two samples do not fit.
    """
    alone = loop and outputs == "trace"
    per_sample = parameters * itemsize * (1 if alone else classes)
    fit = BUDGET // per_sample
    if fit < 2:
        raise MemoryError(f"the Jacobian of two samples takes {2 * per_sample / 2**30:.1f} GiB of the allowed 4")
    tile = samples if fit >= samples else fit // 2
    cuts = [slice(start, min(start + tile, samples)) for start in range(0, samples, tile)]
    stride = 1 if outputs == "trace" else classes
    rule = "ncp,mcp->nm" if outputs == "trace" else "ncp,mdp->ncmd"
    total = torch.zeros(samples * stride, samples * stride)
    for k in range(classes) if alone else [None]:
        for first, upper in enumerate(cuts):
            left = jacobian(upper, k)
            for lower in cuts[first:]:
                right = left if lower is upper else jacobian(lower, k)
                block = sum(torch.einsum(rule, a, b) for a, b in zip(left, right, strict=True))
                i = slice(upper.start * stride, upper.stop * stride)
                j = slice(lower.start * stride, lower.stop * stride)
                block = block.reshape(i.stop - i.start, j.stop - j.start)
                total[i, j] += block
                if upper is not lower:
                    total[j, i] += block.T
    return total
