"""``NarrowWatch``: where the evaluation of a float64 copy of a network leaves float64.

The copy has its parameters, buffers and inputs in float64, but the code of the network may convert them: an RMSNorm that computes
in float32, ``.float()``, ``type_as``, a round trip through NumPy, a backward pass of its own. The results are then rounded to
1e-7 or worse, and no bound that assumes float64 holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, input_tensors, map_inputs, sample_count, take
from lightning_conv.networks.narrow_memory import Memory, Readers
from lightning_conv.networks.narrow_types import (
    bits_of,
    copied,
    digest_of,
    is_floating,
    is_narrow,
    rounds,
    storage_of,
    tensors_in,
    written_by,
)
from lightning_conv.networks.narrowing import Narrowing, coarsest

WATCHED = ("aten", "prim", "prims")
"""Namespaces of the operators whose results show the type in which they compute."""

SHAPE_ONLY = frozenset(
    {
        "aten::empty_like",
        "aten::full_like",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::new_full",
        "aten::new_ones",
        "aten::new_zeros",
        "aten::ones_like",
        "aten::zeros_like",
    }
)
"""Operators that take the shape of a tensor and none of its numbers."""

FEW = 3
"""Number of samples on which numbers from outside are compared."""
ROOM = 10_000
"""Number of storages that are remembered before those that were freed are forgotten."""
CHANGE = 1.0625
"""Factor on the parameters in that comparison."""


class NarrowWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    r"""Watch every operator of an evaluation, forward and backward, for results in a narrower type than that of the module.

    Let an operator f return a result y in a floating (or complex) type with fewer bits. It is reported if y depends on the inputs or
    the parameters, and if the same f applied to the same numbers in float64 gives another result: the operator has then rounded. So
    a conversion of numbers that the narrow type can hold (masks, one-hot rows, token numbers), sums of a mask, and copies and views
    are not reported. What depends only on constants and buffers, such as a table of positions, belongs to the function, as it is
    stored. A module in float32 is watched in the same way for the types that are narrower than that.

    Reported besides: operators of other libraries (``torch.library``), higher-order operators and reinterpreted bits, since nothing is
    seen inside them; numbers that depend on inputs or parameters and are handed to code outside of torch in a forward (``READERS``);
    numbers that enter from outside and change with the inputs or the parameters (``numbers_from_outside``): from NumPy, from Python
    lists, or in memory that another thread or NumPy wrote (``Memory``). A conversion to integers is not a narrowing: the integers are
    exact, and the function, which jumps, is another matter. Not seen are Python numbers that are rounded between ``.item()`` or
    ``.tolist()`` and their use, and arrays that a backward function changes in place.

    The mode changes no bit of the result.

    Args:
        module: the network, in float64 as a rule.
        inputs: the converted inputs of the evaluation, one or several sets.
        parameters: parameters that replace the network's own.

    Attributes:
        found: what was seen, each place once.

    Cost: some 20 us per operator; for results in a narrow type, which are rare, the operator once more in float64.
    """

    supports_higher_order_operators = True

    def __init__(
        self, module: StatelessModule, *inputs: Inputs, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bits, self._room = torch.finfo(module.dtype).bits, ROOM
        self._names: dict[nn.Module, str] = {layer: name for name, layer in module.model.named_modules()}
        self._inside: list[str] = []
        # Whether the numbers of a storage depend on inputs or parameters. The weak references keep an address from being used again.
        self._known: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._memory, self._readers = Memory(), Readers(self._handed_out)
        self._from_outside: list[str] = []
        self._seen: dict[Narrowing, None] = {}
        given = [tensor for some in inputs for tensor in input_tensors(some)]
        for tensor in (*module.parameters.values(), *(parameters or {}).values(), *given):
            self._note(tensor, depends=True)
        for tensor in module.buffers.values():
            self._note(tensor, depends=False)

    @property
    def found(self) -> tuple[Narrowing, ...]:
        """What was seen, each place once, in order."""
        return tuple(self._seen)

    @property
    def from_outside(self) -> tuple[str, ...]:
        """Digests of the floating numbers that were not made by an operator: stored tensors, and those made from Python or NumPy."""
        return tuple(self._from_outside)

    @contextmanager
    def watching(self) -> Iterator[NarrowWatch]:
        """Watch what runs inside, with hooks on all modules that tell where an operator is called."""
        self._inside.clear()
        layers = [layer for layer in self._names if not isinstance(layer, torch.jit.ScriptModule)]  # those refuse hooks
        handles = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        handles += [layer.register_forward_hook(self._leave, always_call=True) for layer in layers]
        try:
            with self._readers, self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        self._inside.append(self._names[module])

    def _leave(self, *_: Any) -> None:
        if self._inside:
            self._inside.pop()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and look at the types of what enters it and what it returns."""
        with torch._C.DisableTorchFunction():  # reads of this mode are not those of the network
            return self._look(func, args, dict(kwargs or {}))

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, schema = tensors_in((args, kwargs)), getattr(func, "_schema", None)
        depends = any([self._depends(tensor) for tensor in given])  # a list: all of them are noted
        depends = depends and (schema is None or schema.name not in SHAPE_ONLY)
        written = written_by(func, args, kwargs)
        if schema is None or not (func.is_view or schema.name in SHAPE_ONLY):
            self.read(tensor for tensor in given if not any(tensor is each for each in written))
        if schema is None or func.namespace not in WATCHED or func is torch.ops.aten.view.dtype:
            result = func(*args, **kwargs)
            made = tensors_in(result)
            if depends and any(is_floating(tensor) for tensor in (*given, *made)):
                self._add("does what cannot be watched", str(func), None)
        else:
            # What an operator overwrites is needed once more if it rounds.
            spare = tree_map(copied, (args, kwargs)) if depends and schema.is_mutable else (args, kwargs)
            result = func(*args, **kwargs)
            made = tensors_in(result) or (given if schema.is_mutable else [])
            narrow = [tensor.dtype for tensor in made if is_narrow(tensor) and bits_of(tensor.dtype) < self._bits]
            if depends and narrow and not func.is_view and rounds(func, spare, made):
                coarse = max(narrow, key=lambda dtype: Narrowing("", "", "", dtype).unit)
                self._add(f"computes in {coarse}", schema.name, coarse)
        for tensor in (*made, *(given if depends and (schema is None or schema.is_mutable) else ())):
            self._note(tensor, depends)
        self._memory.note("" if schema is None else schema.name, given, made, written)
        return result

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Note numbers that no watched operator wrote, of tensors that are read by an operator or are the result."""
        self._from_outside += [digest_of(tensor) for tensor in tensors if self._memory.unseen(tensor)]

    def _handed_out(self, tensor: Tensor, reader: str) -> None:
        """Report a tensor whose numbers a module hands to code outside of torch."""
        if self._inside and is_floating(tensor) and self._depends(tensor):
            self._add("hands its numbers to code outside of torch", reader, None)

    def _add(self, what: str, operator: str, dtype: torch.dtype | None) -> None:
        node = torch._C._current_autograd_node()
        if node is not None:
            module = f"the backward pass, in {node.name()},"
        elif self._inside and self._inside[-1]:
            module = repr(self._inside[-1])
        else:
            module = "the forward of the network itself"
        self._seen.setdefault(Narrowing(module, what, operator, dtype))

    def _depends(self, tensor: Tensor) -> bool:
        """Return whether the numbers depend on inputs or parameters; note floating ones of an unknown origin."""
        key = storage_of(tensor)
        if key is None:
            return True
        known = self._known.get(key.cdata)
        if known is not None:
            return known[1]
        if is_floating(tensor) and tensor.numel():
            self._from_outside.append(digest_of(tensor))
        self._known[key.cdata] = key, False
        return False

    def _note(self, tensor: Tensor, depends: bool) -> None:
        key = storage_of(tensor)
        if key is not None and (depends or key.cdata not in self._known):
            self._known[key.cdata] = key, depends
        if len(self._known) > self._room:
            self._known = {address: known for address, known in self._known.items() if not known[0].expired()}  # type: ignore[no-untyped-call]
            self._memory.forget(self._known)
            self._room = max(ROOM, 2 * len(self._known))


def narrowing_of(
    module: StatelessModule, inputs: Inputs, watch: NarrowWatch, *, cleared: set[str] | None = None, whole: bool = False
) -> Narrowing | None:
    """Return the coarsest finding of a watch that has ended, with what ``numbers_from_outside`` finds, if there are any.

    Args:
        module: the network, inside ``undisturbed``.
        inputs: the converted inputs of the evaluation.
        watch: the watch.
        cleared: digests that are known as constants; those that prove to be are added.
        whole: whether the evaluation was one forward of all ``inputs``, which is then compared; else the first few samples are.
    """
    digests, outside = watch.from_outside, None
    if not set(digests) <= (cleared or set()):
        outside = numbers_from_outside(module, inputs, digests if whole else None)
        if cleared is not None and outside is None:
            cleared.update(digests)
    return coarsest([*watch.found, outside])


def numbers_from_outside(
    module: StatelessModule, inputs: Inputs, first: Sequence[str] | None = None
) -> Narrowing | None:
    """Return whether numbers that enter a forward from outside of torch change with the inputs or the parameters.

    A tensor that no operator made or wrote is a stored constant, or comes from NumPy, a Python list or another thread, where it may
    have been computed in any type. Constants are the same in a second forward, with the samples in another order and other parameters; what
    differs is not a constant. If the second forward fails, nothing is known.

    Args:
        module: the network, inside ``undisturbed``.
        inputs: converted inputs.
        first: digests of a forward of all ``inputs``, or of its beginning; None: two forwards of the first few are compared.

    Cost: one forward, or two of at most three samples.
    """
    if first is None:
        inputs = take(inputs, slice(min(FEW, sample_count(inputs))))
        first = _from_outside(module, {}, inputs)
    changed = {name: value.detach() * CHANGE for name, value in module.parameters.items()}
    second = _from_outside(module, changed, map_inputs(_moved, inputs))
    if first is not None and second is not None and list(first) == list(second[: len(first)]):
        return None
    return Narrowing(
        "the network", "uses numbers that were computed outside of torch", "NumPy, Python or another thread", None
    )


def _moved(samples: Tensor) -> Tensor:
    """Return the samples in another order or, if they are all equal, other ones."""
    flipped = samples.flip(0)
    return samples * CHANGE if is_floating(samples) and torch.equal(flipped, samples) else flipped


def _from_outside(module: StatelessModule, parameters: Mapping[str, Tensor], inputs: Inputs) -> tuple[str, ...] | None:
    """Return the digests of what enters a forward from outside of torch; None: the forward fails."""
    watch = NarrowWatch(module, inputs, parameters=parameters)
    try:
        with watch.watching():
            module.call(parameters, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError):
        return None
    return watch.from_outside
