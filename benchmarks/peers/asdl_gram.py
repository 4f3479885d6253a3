"""ASDL (on the package index: asdfghjkl)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from asdl.kernel import (
    empirical_class_wise_direct_ntk,
    empirical_class_wise_hadamard_ntk,
    empirical_implicit_ntk,
)
from torch import Tensor, nn

from peers.torch_networks import load, reduce_full


def prepare(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str) -> Callable[[], Tensor]:
    """Return the computation that is timed."""
    model, inputs = load(case, arrays, dtype)
    ruled = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)
    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    if case["outputs"] == "full" or not all(isinstance(module, ruled) for module in owners):
        # (n, n, C, C). For the full kernel there is empirical_direct_ntk too, which ends in an error of torch.cat; with
        # recurrent layers and with sequences the class-wise kernels are wrong or raise.
        return lambda: reduce_full(empirical_implicit_ntk(model, inputs).permute(0, 2, 1, 3).detach(), case["outputs"])
    # The Hadamard rule is an approximation if a layer has several positions.
    dense = all(isinstance(module, nn.Linear) for module in owners)
    kernel = empirical_class_wise_hadamard_ntk if dense else empirical_class_wise_direct_ntk
    return lambda: kernel(model, inputs).sum(-1)  # (n, n, C) before the sum
