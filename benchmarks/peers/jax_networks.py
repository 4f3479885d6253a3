"""The networks of `networks.py` as plain jax functions of the same weights; images are NHWC, which XLA on CPUs prefers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Arrays = dict[str, Any]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"softplus": jax.nn.softplus, "relu": jax.nn.relu}
EPSILON = 1e-5  # of BatchNorm and LayerNorm in PyTorch


def network(description: Mapping[str, Any]) -> Callable[[Arrays, Arrays, Array], Array]:
    """Return the function (parameters, buffers, inputs) -> outputs of a description."""
    options = dict(description)
    kind = options.pop("network")
    if kind == "resnet18_cifar":
        kind = "resnet"
    return {"mlp": mlp, "resnet": resnet, "vit_stack": vit_stack, "lstm": lstm}[kind](**options)


def split(arrays: Mapping[str, np.ndarray], dtype: str) -> tuple[Arrays, Arrays, Array]:
    """Convert parameters, buffers and inputs of a case: matrices as (in, out), convolutions as HWIO, images as NHWC.

    In this layout a weight enters a product without a transposition that would have to be differentiated.
    """
    parameters, buffers = {}, {}
    for name, array in arrays.items():
        if not name.startswith("state.") or name.endswith("num_batches_tracked"):
            continue
        value = array.astype(dtype)
        value = value.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(value.ndim))
        (buffers if "running_" in name else parameters)[name.removeprefix("state.")] = value
    inputs = arrays["inputs"].astype(dtype)
    inputs = inputs.transpose(0, 2, 3, 1) if inputs.ndim == 4 else inputs
    return {name: jnp.asarray(value) for name, value in parameters.items()}, buffers, jnp.asarray(inputs)


def linear(p: Arrays, name: str, x: Array) -> Array:
    """x W + b."""
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def mlp(widths: list[int], activation: str = "softplus") -> Callable[[Arrays, Arrays, Array], Array]:
    """As in `networks.py`: the k-th linear layer is module 2 k."""

    def apply(p: Arrays, b: Arrays, x: Array) -> Array:
        for k in range(len(widths) - 1):
            x = linear(p, str(2 * k), x if k == 0 else ACTIVATIONS[activation](x))
        return x

    return apply


def resnet(activation: str = "relu", **_: Any) -> Callable[[Arrays, Arrays, Array], Array]:
    """As in `networks.py`, BatchNorm with the running statistics; the shape is read from the weights."""
    act = ACTIVATIONS[activation]

    def conv(p: Arrays, name: str, x: Array, stride: int = 1) -> Array:
        weight = p[f"{name}.weight"]
        pad = weight.shape[0] // 2
        padding = [(pad, pad), (pad, pad)]
        return lax.conv_general_dilated(
            x, weight, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def norm(p: Arrays, b: Arrays, name: str, x: Array) -> Array:
        mean, var = b[f"{name}.running_mean"], b[f"{name}.running_var"]
        x = (x - mean) * (1 / np.sqrt(var + EPSILON)).astype(var.dtype)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def apply(p: Arrays, b: Arrays, x: Array) -> Array:
        x = act(norm(p, b, "bn", conv(p, "conv", x)))
        k = 0
        while f"blocks.{k}.conv1.weight" in p:
            name = f"blocks.{k}"
            # A block halves the image exactly where it doubles the channels.
            wider = p[f"{name}.conv1.weight"].shape[2] != p[f"{name}.conv1.weight"].shape[3]
            stride = 2 if wider else 1
            branch = act(norm(p, b, f"{name}.bn1", conv(p, f"{name}.conv1", x, stride)))
            branch = norm(p, b, f"{name}.bn2", conv(p, f"{name}.conv2", branch))
            if wider:
                x = norm(p, b, f"{name}.shortcut.1", conv(p, f"{name}.shortcut.0", x, stride))
            x = act(branch + x)
            k += 1
        return linear(p, "head", x.mean((1, 2)))

    return apply


def vit_stack(heads: int = 12, **_: Any) -> Callable[[Arrays, Arrays, Array], Array]:
    """As in `networks.py`."""

    def norm(p: Arrays, name: str, x: Array) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def apply(p: Arrays, b: Arrays, x: Array) -> Array:
        n, t, dim = x.shape
        k = 0
        while f"layers.{k}.qkv.weight" in p:
            name = f"layers.{k}"
            qkv = linear(p, f"{name}.qkv", norm(p, f"{name}.norm1", x)).reshape(n, t, 3, heads, dim // heads)
            query, key, value = qkv.transpose(2, 0, 3, 1, 4)
            weights = jax.nn.softmax(query @ key.swapaxes(-1, -2) * (dim // heads) ** -0.5, -1)
            x = x + linear(p, f"{name}.proj", (weights @ value).transpose(0, 2, 1, 3).reshape(n, t, dim))
            hidden = jax.nn.gelu(linear(p, f"{name}.fc1", norm(p, f"{name}.norm2", x)), approximate=False)
            x = x + linear(p, f"{name}.fc2", hidden)
            k += 1
        return linear(p, "head", norm(p, "norm", x).mean(1))

    return apply


def lstm(hidden: int = 128, **_: Any) -> Callable[[Arrays, Arrays, Array], Array]:
    """As in `networks.py`: gates in PyTorch's order (input, forget, cell, output), the time steps unrolled."""

    def apply(p: Arrays, b: Arrays, x: Array) -> Array:
        state = cell = jnp.zeros((len(x), hidden), x.dtype)
        for step in range(x.shape[1]):
            gates = x[:, step] @ p["lstm.weight_ih_l0"] + p["lstm.bias_ih_l0"]
            gates = gates + state @ p["lstm.weight_hh_l0"] + p["lstm.bias_hh_l0"]
            enter, forget, new, leave = jnp.split(gates, 4, -1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
            state = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return linear(p, "head", state)

    return apply
