"""Modules whose parameters are divided among processes: FSDP2 (``fully_shard``) and tensor-parallel plans (``parallelize_module``)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.networks.equal_numbers import equal_numbers

PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Types of attributes that are put back after the forwards; others are left as the forwards leave them."""


def is_sharded(model: nn.Module) -> bool:
    """Return whether some of its parameters are divided among processes, so that no process has all of them.

    Args:
        model: any module.

    Raises:
        ValueError: it is divided in a way that has no kernel here.
    """
    if "torch.distributed.fsdp" not in sys.modules and "torch.distributed.tensor" not in sys.modules:
        return False
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            where = repr(name) if name else "the module itself"
            raise ValueError(
                f"model: {where} is a FullyShardedDataParallel (FSDP1), whose flat parameters hide the layers; wrap it by "
                "torch.distributed.fsdp.fully_shard (FSDP2), as ModelParallelStrategy does"
            )
    return bool(_parts(model)) or any(map(is_divided, (*model.parameters(), *model.buffers())))


def require_whole(model: nn.Module) -> None:
    """Refuse a sharded module where a copy of it or all of its parameters are needed.

    Args:
        model: the argument of this name.

    Raises:
        ValueError: it is sharded.
    """
    if is_sharded(model):
        raise ValueError(
            "model: its parameters are sharded, and this needs all of them in one process; ntk_gram computes its kernel as it is, "
            "and anything else is computed of a module that is not sharded (gather the state_dict)"
        )


def is_divided(tensor: object) -> bool:
    """Return whether a tensor is a ``DTensor``."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as each process would have it alone; all processes of its mesh call this together, unless it is not divided.

    Args:
        tensor: any tensor.
    """
    divided: Any = tensor
    return divided.full_tensor() if is_divided(tensor) else tensor


def meshes_of(model: nn.Module) -> list[Any]:
    """Return the meshes of processes among which its parameters are divided.

    Args:
        model: a sharded module.
    """
    tensors: list[Any] = [each for each in (*model.parameters(), *model.buffers()) if is_divided(each)]
    found = [each.device_mesh for each in tensors]
    found += [group.mesh_info.mesh for part in _parts(model) for group in _groups(part)]
    return list(dict.fromkeys(found))


def get_ready(root: nn.Module) -> None:
    """Tell FSDP that this module is the outermost one, before a part of it is evaluated by itself.

    FSDP takes the first module that is called for the outermost one, and refuses the real one later.

    Args:
        root: the module that training calls; nothing is done unless it is wrapped.
    """
    if (state := _state(root)) is not None:
        state._lazy_init()


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluate a sharded module itself, since a copy of one is not right, and leave it as it was found.

    Inside, no gradient is reduced, so that those of an accumulation that has begun stay where they are. Afterwards buffers, plain
    attributes, the settings of FSDP and which parts have their parameters gathered are what they were. Training flags and random
    numbers are those of ``undisturbed``. After an error FSDP begins anew.

    Args:
        model: the module; all processes that have a part of it do this together.
    """
    parts = _parts(model)
    groups = [group for part in parts for group in _groups(part)]
    settings = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]
    contexts = list({id(state._state_ctx): state._state_ctx for part in parts if (state := _state(part))}.values())
    last = [(context, context.is_last_backward) for context in contexts]
    gathered = [part for part in parts if any(group.is_unsharded for group in _groups(part))]
    values = [(vars(each), _plain(each)) for each in model.modules()]
    buffers = [(each, each.detach().clone()) for each in model.buffers() if not is_divided(each)]
    held = [(vars(each)["_buffers"], dict(each._buffers)) for each in model.modules()]
    grads = [(each, each.grad) for each in model.parameters()]
    try:
        for part in gathered:
            part.reshard()
        for group in groups:
            group.reduce_grads = group.all_reduce_grads = False
        for context, _ in last:
            context.is_last_backward = True
        with warnings.catch_warnings():
            # FSDP warns where an output is a view, which nothing here writes to.
            warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
            yield
        for part in parts:
            part.reshard()
        for part in gathered:
            part.unshard()
    except BaseException:
        for part in parts:
            with suppress(RuntimeError, AttributeError):  # only the outermost one resets
                part.reset_iter_state()
            with suppress(RuntimeError):
                part.reshard()
        raise
    finally:
        for group, reduce, everywhere in settings:
            group.reduce_grads, group.all_reduce_grads = reduce, everywhere
        for context, was in last:
            context.is_last_backward = was
        for now, before in held:
            now.clear()
            now.update(before)
        with torch.no_grad():
            for buffer, kept in buffers:
                if not equal_numbers(buffer, kept):
                    buffer.copy_(kept)
        for names, plain in values:
            names.update(plain)
        for parameter, grad in grads:
            if parameter.grad is not grad:
                parameter.grad = grad


@contextmanager
def parameters_told(model: nn.Module, tell: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call a function with the name of each parameter and the tensor that a forward inside has in its place.

    FSDP puts gathered parameters into the modules just before their forward, so they are looked up by a hook behind FSDP's own.

    Args:
        model: a sharded module.
        tell: takes name and tensor.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = [
        (module, key, names[id(parameter)])
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in names
    ]

    def told(inside: list[tuple[nn.Module, str, str]]) -> Callable[..., None]:
        def hook(*_: object) -> None:
            for module, key, name in inside:
                tensor = module._parameters.get(key)
                if tensor is not None:
                    tell(name, tensor)

        return hook

    for module, key, name in places:
        tell(name, module._parameters[key])  # type: ignore[arg-type]
    handles = []
    try:
        for part in _parts(model):
            within = set(part.modules())
            handles.append(part.register_forward_pre_hook(told([each for each in places if each[0] in within])))
        yield
        # What was gathered for a method other than ``forward``, which runs no hook, is told afterwards: it has no recorded use.
        of_place = {(id(module), key): name for module, key, name in places}
        for parameter in (each for part in _parts(model) for group in _groups(part) for each in group.fsdp_params):
            info = parameter._module_info
            known = of_place.get((id(info.module), info.param_name))
            gathered = getattr(parameter, "_unsharded_param", None)
            if known is not None and gathered is not None:
                tell(known, gathered)
    finally:
        for handle in handles:
            handle.remove()


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name != "training" and isinstance(value, PLAIN)}


def _state(module: nn.Module) -> Any:
    """Return the state that ``fully_shard`` keeps for a module; None: it is not wrapped itself."""
    get = getattr(module, "_get_fsdp_state", None)
    return None if get is None else get()


def _parts(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was called on, the outer ones first."""
    return [each for each in model.modules() if _state(each) is not None]


def _groups(part: nn.Module) -> list[Any]:
    """Return the groups of parameters that are gathered together for a wrapped module."""
    state = _state(part)
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.10; before that there is at most one
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
