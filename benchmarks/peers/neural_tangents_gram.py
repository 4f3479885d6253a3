"""neural-tangents: ``empirical_ntk_fn``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import neural_tangents as nt
import numpy as np
from jax import Array

from peers.jax_networks import network, split


def prepare(
    case: Mapping[str, Any], arrays: Mapping[str, np.ndarray], dtype: str, *, implementation: int
) -> Callable[[], Array]:
    """Return the computation that is timed; its first call compiles."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    apply = network(case["description"])
    parameters, buffers, inputs = split(arrays, dtype)
    trace = case["outputs"] == "trace"
    classes, n = case["classes"], len(inputs)
    kernel = nt.empirical_ntk_fn(
        lambda p, x: apply(p, buffers, x),
        trace_axes=(-1,) if trace else (),
        vmap_axes=0,  # the samples do not interact; without it the derivatives of all outputs by all samples are formed
        implementation=implementation,
    )

    def matrix(inputs: Array, parameters: Any) -> Array:
        found = kernel(inputs, None, parameters)
        # With trace axes the result is the mean over them; without, it is (n, n, C, C).
        return found * classes if trace else found.transpose(0, 2, 1, 3).reshape(n * classes, n * classes)

    compiled = jax.jit(matrix)
    return lambda: compiled(inputs, parameters).block_until_ready()
