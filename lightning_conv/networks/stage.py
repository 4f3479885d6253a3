"""``Stage``: where a user's module is evaluated so that nothing reaches it: a copy of its structure that was tried once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_conv.networks.called_on import called_on
from lightning_conv.networks.copying import HOOKS, Copy
from lightning_conv.networks.equal_numbers import equal_numbers
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.narrow_types import is_floating, storage_of, tensors_in, written_by
from lightning_conv.networks.sharded import require_whole
from lightning_conv.networks.state import Kept, restored
from lightning_conv.networks.supported import require_supported

FEW = 3
"""Samples on which a module is tried."""
TRIED = 8
"""Number of hooks that are tried one by one."""


class ReachesBackError(RuntimeError):
    """A copy of a module uses the module itself."""


class Stage:
    """A module, or a copy of it, and how it is called so that every call computes the function of the user's present module.

    Attributes:
        module: what to evaluate.
        before: see ``StatelessModule``.
        copies: see ``StatelessModule``.
        seconds: how long it took to copy the module and to try the copy.
    """

    seconds = 0.0

    def __init__(
        self, module: nn.Module, kept: Kept | None, *, before: Callable[[], None] | None = None, copies: bool = False
    ) -> None:
        self.module, self._kept, self.before, self.copies = module, kept, before, copies

    def stateless(self, **options: Any) -> StatelessModule:
        """Return the module as a function; the options are those of ``StatelessModule``."""
        return StatelessModule(self.module, before=self.before, copies=self.copies, **options)

    def wrote(self) -> bool:
        """Return whether calls have changed attributes that are not put back before each call, and put them back from now on."""
        if self.before is not None or self._kept is None or not self._kept.changed():
            return False
        self.before = self._kept.restore
        return True

    def guard(self) -> AbstractContextManager[object]:
        """Return a context for calls after ``staged`` has ended: it puts back the attributes of a model that is no copy."""
        return nullcontext() if self._kept is not None else restored(self.module)


@contextmanager
def staged(model: nn.Module, inputs: Inputs) -> Iterator[Stage]:
    """Provide a ``Stage`` for a model inside ``undisturbed``; the model is bit for bit the same afterwards, even after an error.

    The stage is a copy of the model's structure (``Copy``), on which a few samples are passed once, on copies of the weights. From this
    pass it is known whether the forward writes to its weights (``nn.Embedding(max_norm=)``, ``.data``) or to attributes (counters,
    hidden states, collected outputs, metrics), which are then put back before each call, and which hooks of the user only look:
    the outputs and their gradients are the same to the last bit without them. Those are left out. If the model cannot be
    copied, or the copy uses the model itself, the model is evaluated, and its attributes are put back.

    Args:
        model: the user's module.
        inputs: its samples.

    Yields:
        The stage.

    Raises:
        ValueError: a layer is not initialised yet or is quantised; the parameters are sharded.

    Cost: a copy of the attributes; a forward of at most three samples, with their gradients if there are hooks; a copy of the weights
    for this time.
    """
    require_supported(model)
    require_whole(model)
    start = time.perf_counter()
    stage = _copied_stage(model, inputs)
    seconds = time.perf_counter() - start
    if stage is not None:
        stage.seconds = seconds
        with called_on(type(model).__name__, inputs):
            yield stage
        return
    with restored(model) as put_back, called_on(type(model).__name__, inputs):
        yield Stage(model, None, before=put_back, copies=True)


def _copied_stage(model: nn.Module, inputs: Inputs) -> Stage | None:
    """Return a stage on a copy that was tried; None: there is none that stands on its own."""
    try:
        made = Copy(model)
        kept = Kept(made)
        stage = Stage(made.module, kept)
        few = take(inputs, slice(min(FEW, sample_count(inputs))))
        if _writes_attributes(stage, made, kept, few):
            # The source is a copy, too: the attributes of the original may change while an operator is in use.
            made = Copy(Copy(model).module)
            kept = Kept(made)
            stage = Stage(made.module, kept, before=kept.restore, copies=stage.copies)
            _writes_attributes(stage, made, kept, few)
            kept.restore()
        _leave_out_lookers(stage, few)
        kept.take_structure()
    except Exception:  # copying runs any code of the user's
        return None
    return stage


def _writes_attributes(stage: Stage, made: Copy, kept: Kept, few: Inputs) -> bool:
    """Pass a few samples through the copy; return whether attributes were written, and set ``copies`` if weights were.

    Raises:
        ReachesBackError: the forward uses modules, weights or buffers of the original.
    """
    module = _function(stage)
    with module.on_copies() as wrote, _refused_to(made.original), _Watch(made.original, module) as watch:
        try:
            module.call({}, module.convert(few))
        except ReachesBackError:
            raise
        except Exception:  # reading the network says what is wrong with it
            pass
    stage.copies = stage.copies or watch.wrote or wrote()
    return kept.changed()


def _function(stage: Stage) -> StatelessModule:
    """Return the stage as a function in any mode of BatchNorm, whose statistics do not matter here."""
    try:
        return stage.stateless()
    except ValueError:  # a layer has none
        return stage.stateless(batch_norm="batch")


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees operators that write to the copied weights, and operators that take weights or buffers of the original."""

    supports_higher_order_operators = True

    def __init__(self, original: nn.Module, module: StatelessModule) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = _addresses(module.parameters.values())
        self._original = _addresses((*original.parameters(), *original.buffers()))
        self.wrote = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and look at its arguments."""
        if not self._original.isdisjoint(_addresses(tensors_in((args, kwargs or {})))):
            raise ReachesBackError("a copy of the module uses weights or buffers of the module itself")
        if written := written_by(func, args, kwargs or {}):
            self.wrote |= not self._weights.isdisjoint(_addresses(written))
        return func(*args, **(kwargs or {}))


def _addresses(tensors: Any) -> set[int]:
    keys = [storage_of(tensor) for tensor in tensors if is_floating(tensor) and tensor.numel()]
    return {key.cdata for key in keys if key is not None}


@contextmanager
def _refused_to(original: nn.Module) -> Iterator[None]:
    """Refuse calls of the original's modules."""

    def refuse(layer: nn.Module, _: Any) -> NoReturn:
        raise ReachesBackError(f"a copy of the module calls the module itself ({type(layer).__name__})")

    layers = [each for each in original.modules() if not isinstance(each, torch.jit.ScriptModule)]
    with ExitStack() as stack:
        for each in layers:
            before = vars(each)["_forward_pre_hooks"]
            # In front of the user's own hooks, and without a number of torch's counter.
            vars(each)["_forward_pre_hooks"] = type(before)({-1: refuse})
            stack.callback(vars(each).__setitem__, "_forward_pre_hooks", before)
        yield


def _leave_out_lookers(stage: Stage, few: Inputs) -> None:
    """Remove the hooks of the copy without which outputs and gradients are the same to the last bit."""
    hooks = [
        (vars(each)[kind], key) for each in stage.module.modules() for kind in HOOKS for key in vars(each).get(kind, ())
    ]
    if not hooks:
        return
    expected = _signature(stage, few)
    if expected is None:
        return
    for group in [hooks, *([[hook] for hook in hooks] if 1 < len(hooks) <= TRIED else [])]:
        removed = [(held, key, held.pop(key)) for held, key in group if key in held]
        if not removed:
            continue
        found = _signature(stage, few)
        if found is None or not all(map(equal_numbers, found, expected)) or len(found) != len(expected):
            for held, key, hook in removed:
                held[key] = hook


def _signature(stage: Stage, few: Inputs) -> list[Tensor] | None:
    """Return the outputs and the gradients of a random combination of them; None: the forward fails."""
    module = _function(stage)
    few = module.convert(few)
    leaves = {name: value.clone().requires_grad_() for name, value in module.parameters.items()}
    torch.default_generator.manual_seed(0)
    try:
        outputs = [each for each in tensors_in(module.call(leaves, few)) if is_floating(each)]
        weighted = sum((torch.randn(each.shape).to(each) * each).sum() for each in outputs if each.requires_grad)
        if not isinstance(weighted, Tensor):
            return [each.detach() for each in outputs]
        found = torch.autograd.grad(weighted, list(leaves.values()), allow_unused=True, materialize_grads=True)
    except Exception:  # a hook is needed
        return None
    return [*(each.detach() for each in outputs), *found]
