"""This library: ``ntk_gram``, and the plan of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lightning_conv import ntk_gram, plan_ntk
from peers.torch_networks import load


def prepare(
    case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str, *, precision: str, planned: bool = False
) -> Callable[[], Tensor]:
    """Return the computation that is timed."""
    model, inputs = load(case, arrays, dtype)
    made = plan_ntk(model, inputs, outputs=case["outputs"], precision=precision) if planned else None
    return lambda: ntk_gram(model, inputs, outputs=case["outputs"], precision=precision, plan=made).matrix


def plan(
    case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str, *, precision: str, planned: bool = False
) -> dict[str, Any]:
    """Return the library's prediction: flops, bytes and seconds."""
    del planned
    model, inputs = load(case, arrays, dtype)
    made = plan_ntk(model, inputs, outputs=case["outputs"], precision=precision)
    return {"flops": float(made.flops), "bytes": float(made.bytes), "seconds": float(made.seconds)}
