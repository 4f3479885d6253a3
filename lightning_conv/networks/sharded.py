"""Modules whose parameters are divided among processes: FSDP2 (``fully_shard``) and tensor-parallel plans (``parallelize_module``)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_conv.networks.equal_numbers import equal_numbers
from lightning_conv.networks.state import restored

T = TypeVar("T")


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
    found += [group.mesh_info.mesh for group in _groups(_states(model))]
    return list(dict.fromkeys(found))


def agreed(model: nn.Module, value: T) -> T:
    """Return the value that the first process has, so that all decide by the same one; all processes of the module call this together.

    Args:
        model: a sharded module.
        value: a tensor, or what can be pickled and holds none on a device.
    """
    if isinstance(value, Tensor):
        sent = value.detach().to(meshes_of(model)[0].device_type, copy=True, memory_format=torch.contiguous_format)
        for group in _process_groups(model):
            dist.broadcast(sent, dist.get_global_rank(group, 0), group)
        return sent.to(value.device)  # type: ignore[return-value]
    box = [value]
    for group in _process_groups(model):
        dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group)
    return box[0]


def _process_groups(model: nn.Module) -> list[Any]:
    return [group for mesh in meshes_of(model) for group in mesh.get_all_groups()]


def get_ready(root: nn.Module) -> None:
    """Tell FSDP that this module is the outermost one, before a part of it is evaluated by itself.

    FSDP takes the first module that is called for the outermost one, and refuses the real one later.

    Args:
        root: the module that training calls; nothing is done unless it is wrapped.
    """
    outermost: Any = root
    if _parts(outermost)[:1] == [outermost]:
        outermost._get_fsdp_state()._lazy_init()


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluate a sharded module itself, since a copy of one is not right, and leave it as it was found.

    Inside, all processes have the buffers of the first one, and no gradient is reduced, so that those of an accumulation that has begun
    stay where they are. Afterwards buffers, attributes, the settings of FSDP, the order of its forwards whose backward passes are to
    come, and which parts have their parameters gathered are what they were; after an error none is gathered. Training flags and random
    numbers are those of ``undisturbed``.

    Args:
        model: the module; all processes that have a part of it do this together.

    Raises:
        RuntimeError: FSDP is inside a forward or backward pass.
    """
    states = _states(model)
    groups = _groups(states)
    if any(_is_busy(each) for each in (*states, *groups)):
        raise RuntimeError(
            "model: FSDP is inside a forward or backward pass of it; measure before or after, not in a hook"
        )
    settings = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]
    last = [(state._state_ctx, state._state_ctx.is_last_backward) for state in states]
    orders = [list(each) for each in _orders(groups)]
    buffers = [(each, each.detach().clone()) for each in model.buffers() if not is_divided(each)]
    grads = [(each, each.grad) for each in model.parameters()]
    gathered = [group for group in groups if group.is_unsharded]
    for group in gathered:
        group.reshard()
    with restored(model), warnings.catch_warnings():
        # FSDP warns where an output is a view, which nothing here writes to.
        warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
        try:
            for group in groups:
                group.reduce_grads = group.all_reduce_grads = False
            for context, _ in last:
                context.is_last_backward = True
            if buffers:
                first = agreed(model, [before.cpu() for _, before in buffers])
                _put_in([(each, value.to(each.device)) for (each, _), value in zip(buffers, first, strict=True)])
            yield
        except BaseException:
            _end_passes(states, groups)
            raise
        finally:
            for group in groups:
                group.reshard()
            for group, reduce, everywhere in settings:
                group.reduce_grads, group.all_reduce_grads = reduce, everywhere
            for context, was in last:
                context.is_last_backward = was
            for now, before in zip_longest(_orders(groups), orders):
                now[:] = before or ()
            _put_in(buffers)
            for parameter, grad in grads:
                if parameter.grad is not grad:
                    parameter.grad = grad
    for group in gathered:  # but not after an error, when another process may not take part
        group.unshard()
        group.wait_for_unshard()


def _put_in(buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in buffers:
        if not equal_numbers(buffer, value):
            buffer.data.copy_(value)  # unseen by autograd, since a backward pass to come may use it


def _is_busy(each: Any) -> bool:
    return bool(each._training_state.name != "IDLE")


def _end_passes(states: list[Any], groups: list[Any]) -> None:
    """Let FSDP forget a forward or backward pass that an error has ended, and keep the gradients that it has.

    ``reset_iter_state`` of newer versions of torch is for the outermost module only, and drops gradients that are accumulated.
    """
    for each in (*states, *groups):
        each._training_state = type(each._training_state)["IDLE"]
    for state in states:
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        getattr(state, "_modules_to_run_forward", set()).clear()
    for group in groups:
        group.wait_for_unshard()  # of what was fetched ahead


def _orders(groups: list[Any]) -> list[list[Any]]:
    """Return the lists in which FSDP notes the order of its forwards; before the first of them there is none for all together."""
    common = [getattr(each.comm_ctx, "post_forward_order", None) for each in groups]
    return [*(each._post_forward_indices for each in groups), *(each for each in common if each is not None)]


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
        for parameter in (each for group in _groups(_states(model)) for each in group.fsdp_params):
            info = parameter._module_info
            known = of_place.get((id(info.module), info.param_name))
            gathered = getattr(parameter, "_unsharded_param", None)
            if known is not None and gathered is not None:
                tell(known, gathered)
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was called on, the outer ones first."""
    return [each for each in model.modules() if hasattr(each, "_get_fsdp_state")]


def _states(model: nn.Module) -> list[Any]:
    """Return what ``fully_shard`` keeps of its modules, each once."""
    return list({id(state): state for part in _parts(model) for state in [part._get_fsdp_state()]}.values())


def _groups(states: list[Any]) -> list[Any]:
    """Return the groups of parameters that are gathered together."""
    found: list[Any] = []
    for state in states:  # newer versions of torch have several in one
        found += getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [each for each in found if each is not None]
