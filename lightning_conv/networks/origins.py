"""``type_refusal``: where a forward makes numbers of a type of its own, so that it cannot be evaluated in another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.narrow_types import bits_of, is_floating, tensors_in
from lightning_conv.networks.narrowing import Narrowing

FEW = 3
"""Samples on which the place is looked for."""
FAILURES = (RuntimeError, TypeError, ValueError, AssertionError, IndexError, KeyError)
"""What a forward raises that is given a type it was not written for."""

Make: TypeAlias = Callable[..., StatelessModule]


class NoSuchPathError(TypeError):
    """The network cannot be evaluated in the type that was asked for, since its forward makes numbers of another type.

    Args:
        asked: the argument that asks for the type, as the user wrote it.
        dtype: the type.
        narrowing: the place.
        failure: what fails there; empty: the outputs are of the other type.
        cure: what to do instead.
    """

    def __init__(self, asked: str, dtype: torch.dtype, narrowing: Narrowing, failure: str, cure: str) -> None:
        then = failure or "the outputs are of that type"
        super().__init__(f"{asked} needs {dtype}, but {narrowing}; {cure} ({then})")
        self.narrowing = narrowing


@dataclass(frozen=True)
class TypeRefusal:
    """Why a forward cannot be evaluated in a type."""

    narrowing: Narrowing
    failure: str  # what fails, and where; empty: nothing fails, but the outputs have another type


@contextmanager
def path_required(make: Make, inputs: Inputs, dtype: torch.dtype | None, *, asked: str, cure: str) -> Iterator[None]:
    """Replace an error inside by a ``NoSuchPathError`` where its cause is the type of the evaluation.

    Args:
        make: returns the network as a function, inside ``undisturbed``; takes the options of ``StatelessModule``.
        inputs: samples as the caller gave them.
        dtype: type of the evaluation inside; None: see ``StatelessModule``.
        asked: see ``NoSuchPathError``.
        cure: see ``NoSuchPathError``.

    Raises:
        NoSuchPathError: the forward works in the model's own type and not in that of the evaluation.
        OutOfMemoryError: the device is out of memory.

    Cost: nothing without an error; with one two forwards of three samples.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        # Errors with another cause, such as samples that couple, are raised as they are.
        found = type_refusal(make, inputs, dtype)
        if found is None:
            raise
        used = make(dtype=dtype, batch_norm="batch").dtype
        raise NoSuchPathError(asked, used, found.narrowing, found.failure, cure) from error


def type_refusal(make: Make, inputs: Inputs, dtype: torch.dtype | None) -> TypeRefusal | None:
    """Return why a network cannot be evaluated in a type although it can be in its own; None: it can, or in neither.

    Args:
        make: see ``path_required``.
        inputs: samples as the caller gave them; the first few are used.
        dtype: the type, see ``StatelessModule``.

    Cost: two forwards of three samples.
    """
    # The statistics of BatchNorm do not matter here; this mode asks for none.
    module = make(dtype=dtype, batch_norm="batch")
    own = make(dtype=module.model_dtype, batch_norm="batch")
    few = take(inputs, slice(min(FEW, sample_count(inputs))))
    if own.dtype != module.dtype and not _works(own, few):
        return None
    with Origins(module) as origins:
        try:
            result = module.call({}, module.convert(few))
        except FAILURES as error:
            if own.dtype == module.dtype:
                return None
            return _refusal(origins, module, f"{origins.where} fails: {type(error).__name__}: {error}")
    if not module.strict:  # the outputs are converted
        return None
    others = [each for each in tensors_in(result) if is_floating(each) and each.dtype != module.dtype]
    origins.blame(others)
    return _refusal(origins, module, "") if others else None


def _works(module: StatelessModule, inputs: Inputs) -> bool:
    try:
        module.call({}, module.convert(inputs))
    except FAILURES:
        return False
    return True


def _refusal(origins: Origins, module: StatelessModule, failure: str) -> TypeRefusal | None:
    if origins.found is not None:
        return TypeRefusal(origins.found, failure)
    if module.dtype == module.model_dtype:
        return None
    # What was converted is not seen in compiled code, and a check of the type converts nothing.
    kind = module.model_dtype
    return TypeRefusal(Narrowing(origins.where, f"works in {kind} only", "its own code", kind), failure)


class Origins(TorchFunctionMode):
    """Follows floating numbers of another type than the evaluation's to the function that made them.

    Args:
        module: the network, inside ``undisturbed``.

    Attributes:
        found: the place where those numbers were made that entered the function which failed.
    """

    def __init__(self, module: StatelessModule) -> None:
        super().__init__()
        self._module, self._dtypes = module, (module.dtype, module.dtype.to_complex())
        self._names: dict[nn.Module, str] = {layer: name for name, layer in module.model.named_modules()}
        self._inside: list[nn.Module] = []
        self._made: dict[int, tuple[Tensor, Narrowing]] = {}  # the tensors are kept so that no address is used again
        self._first: Narrowing | None = None
        self.found: Narrowing | None = None
        self._failed = ""
        self._handles: list[Any] = []

    def __enter__(self) -> Origins:
        """Begin to watch, with hooks that tell in which module the forward is."""
        layers = [layer for layer in self._names if not isinstance(layer, torch.jit.ScriptModule)]  # those refuse hooks
        self._handles = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        self._handles += [layer.register_forward_hook(self._leave) for layer in layers]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        """End it, and remove the hooks."""
        for handle in self._handles:
            handle.remove()
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self.found = self.found or self._first

    def _enter(self, layer: nn.Module, _: tuple[Any, ...]) -> None:
        self._inside.append(layer)

    def _leave(self, *_: Any) -> None:  # not called where the layer fails
        self._inside.pop()

    @property
    def where(self) -> str:
        """The module in which the forward is, or was when it failed."""
        return self._failed or self._place()

    def _place(self) -> str:
        layer = self._inside[-1] if self._inside else self._module.model
        name = self._names[layer]
        return (
            f"{name!r} ({type(layer).__name__})"
            if name
            else f"the forward of the network itself ({type(layer).__name__})"
        )

    def blame(self, tensors: Sequence[Tensor]) -> None:
        """Take the first of these tensors that is known for the cause."""
        known = [self._made[id(each)][1] for each in tensors if id(each) in self._made]
        self.found = known[0] if known else self.found

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function and note what it makes."""
        given = [each for each in tensors_in((args, kwargs)) if self._other(each)]
        try:
            result = func(*args, **(kwargs or {}))
        except FAILURES:
            self._failed = self._place()
            self.blame(given)
            raise
        for made in tensors_in(result):
            if self._other(made) and id(made) not in self._made:
                from_given = next((self._made[id(each)][1] for each in given if id(each) in self._made), None)
                place = from_given or self._narrowing(func, made)
                self._made[id(made)] = made, place
                self._first = self._first or place
        return result

    def _other(self, tensor: Tensor) -> bool:
        return is_floating(tensor) and tensor.dtype not in self._dtypes

    def _narrowing(self, func: Callable[..., Any], made: Tensor) -> Narrowing:
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        return Narrowing(self._place(), f"makes {made.dtype}", name, made.dtype if bits_of(made.dtype) else None)
