"""``run_state``: everything that a run leaves behind, by name, to the last bit."""

import dataclasses
import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

OWN = (
    frozenset(vars(nn.Module()))
    | frozenset(vars(pl.LightningModule()))
    | {"training", "_modules", "_torchdynamo_wrapper_id"}
)
"""Attributes that torch and Lightning keep on every module; compared apart or without meaning for the user."""

State = dict[str, object]


def run_state(trainer: pl.Trainer, data: Any, losses: list[Any]) -> State:
    """Return weights, buffers, gradients, optimizers' states, losses, generators, attributes, hooks, logged values, settings.

    Args:
        trainer: Of the finished run.
        data: What was passed to ``Trainer.fit``.
        losses: What each training step returned, in order.
    """
    module, found = trainer.lightning_module, {}
    for name, parameter in module.named_parameters():
        _put(found, f"weight {name}", parameter)
        _put(found, f"gradient {name}", (parameter.requires_grad, parameter.grad))
    for name, buffer in module.named_buffers():
        _put(found, f"buffer {name}", buffer)
    for index, optimizer in enumerate(trainer.optimizers):
        _put(found, f"optimizer {index}", optimizer.state_dict())
    _put(found, "loss", losses)
    _put(
        found,
        "generator",
        {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()},
    )
    _put(found, "logged", dict(trainer.callback_metrics))
    _put(found, "step", (trainer.global_step, trainer.current_epoch))
    for name, each in module.named_modules():
        _put(found, f"mode of {name}", each.training)
        _put(
            found, f"hooks of {name}", [len(vars(each).get(kind, ())) for kind in vars(each) if kind.endswith("_hooks")]
        )
        for key, value in vars(each).items():
            if key not in OWN:
                _put(found, f"attribute {name}.{key}", value)
    for index, loader in enumerate(_loaders(data)):
        own = {"generator": loader.generator, "sampler": getattr(loader.sampler, "generator", None)}
        _put(found, f"data {index}", {**own, "set": _vars(loader.dataset), "collate": _vars(loader.collate_fn)})
    _put(found, "setting", _settings())
    return found


def differences(plain: State, watched: State) -> list[str]:
    """Return the names of what differs; what only the watched run logged is its own."""
    names = [name for name in {**plain, **watched} if name in plain or not name.startswith("logged")]
    return [name for name in names if plain.get(name, "missing") != watched.get(name, "missing")]


def _settings() -> dict[str, object]:
    """Return what is set for all of torch and may have been set otherwise for a measurement."""
    return {
        "gradients": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def _vars(value: Any) -> dict[str, Any]:
    return dict(getattr(value, "__dict__", {}))


def _loaders(data: Any) -> list[DataLoader[Any]]:
    if isinstance(data, DataLoader):
        return [data]
    if isinstance(data, Mapping):
        return [each for value in data.values() for each in _loaders(value)]
    return [each for value in data for each in _loaders(value)] if isinstance(data, (list, tuple)) else []


def _put(found: State, name: str, value: Any) -> None:
    """Write the value under its name; what has parts goes in part by part."""
    if isinstance(value, Tensor):
        found[name] = _bits(value)
    elif isinstance(value, np.ndarray):
        found[name] = (str(value.dtype), value.shape, value.tobytes())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _put(found, f"{name}.{key}", each)
    elif isinstance(value, (list, tuple, deque)):
        found[f"{name} length"] = len(value)
        for index, each in enumerate(value):
            _put(found, f"{name}[{index}]", each)
    elif isinstance(value, torch.Generator):
        found[name] = _bits(value.get_state())
    elif isinstance(value, random.Random):
        found[name] = value.getstate()
    elif isinstance(value, np.random.Generator):
        found[name] = repr(value.bit_generator.state)
    elif isinstance(value, (np.random.RandomState,)):
        found[name] = repr(value.get_state())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _put(found, name, {each.name: getattr(value, each.name) for each in dataclasses.fields(value)})
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        found[name] = repr(value)
    else:
        found[name] = type(value).__qualname__


def _bits(tensor: Tensor) -> object:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return "not initialised"
    held = tensor.detach().cpu()
    held = (held.to_dense() if held.is_sparse else held).contiguous()
    return str(tensor.dtype), tuple(tensor.shape), held.reshape(-1).view(torch.uint8).numpy().tobytes()
