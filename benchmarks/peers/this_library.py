"""This library: ``ntk_gram``, and the plan of a kernel where the version at hand makes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

import lightning_conv
from lightning_conv import ntk_gram
from peers.torch_networks import load


def prepare(
    case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str, *, precision: str
) -> Callable[[], Tensor]:
    """The computation that is timed."""
    model, inputs = load(case, arrays, dtype)
    return lambda: ntk_gram(model, inputs, outputs=case["outputs"], precision=precision).matrix


def plan(case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str, *, precision: str) -> dict[str, Any]:
    """What the library promises: flops, bytes and seconds; an entry ``missing`` with the reason if it does not."""
    planner = getattr(lightning_conv, "plan_ntk", None)
    if planner is None:
        return {"missing": f"lightning_conv {lightning_conv.__version__} has no plan_ntk"}
    model, inputs = load(case, arrays, dtype)
    made = planner(model, inputs, outputs=case["outputs"], precision=precision)
    found = {name: getattr(made, name, None) for name in ("flops", "bytes", "seconds")}
    return {name: float(value) for name, value in found.items() if value is not None}
