"""``NarrowWatch``: where the evaluation of a float64 copy of a network leaves float64.

The copy has its parameters, buffers and inputs in float64, but the code of the network may convert them: an RMSNorm that computes
in float32, ``.float()``, ``type_as``, a round trip through NumPy, a backward pass of its own. The results are then rounded to
1e-7 or worse, and no bound that assumes float64 holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_conv.linalg.rounding import unit_roundoff
from lightning_conv.networks.evaluation import Inputs, StatelessModule, input_tensors, map_inputs, sample_count, take

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


@dataclass(frozen=True)
class Narrowing:
    """A place at which an evaluation is not one in float64."""

    module: str  # in words: the module's name, or the backward pass
    what: str
    operator: str
    dtype: torch.dtype | None  # the narrow type; None: not known

    @property
    def unit(self) -> float:
        """Unit roundoff of the narrow type; 1 where it is not known."""
        known = self.dtype is not None and (self.dtype.is_floating_point or self.dtype.is_complex)
        return unit_roundoff(self.dtype) if known and self.dtype is not None else 1.0

    def __str__(self) -> str:
        """Return the text for messages, such as ``'norm' computes in torch.float32 (aten::_to_copy)``."""
        return f"{self.module} {self.what} ({self.operator})"


class NarrowedError(TypeError):
    """Features that were asked for in float64 are rounded to a narrower type by a cast inside the network.

    Args:
        features: the features, in float64 by their type.
        narrowing: the place of the cast.
    """

    def __init__(self, features: Tensor, narrowing: Narrowing) -> None:
        super().__init__(
            f"features: asked for in float64, but {narrowing}, so they are rounded and a rank or a bound from them would be false; "
            "remove the cast inside forward, or compute in the type of the input there"
        )
        self.features, self.narrowing = features, narrowing


def coarsest(found: Sequence[Narrowing | None]) -> Narrowing | None:
    """Return the finding with the coarsest type, the first of several; None: there is none."""
    return max((each for each in found if each is not None), key=lambda each: each.unit, default=None)


class NarrowWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    r"""Watch every operator of an evaluation, forward and backward, for results in a narrower type than that of the module.

    Let an operator f return a result y in a floating (or complex) type with fewer bits. It is reported if y depends on the inputs or
    the parameters, and if the same f applied to the same numbers in float64 gives another result: the operator has then rounded. So
    a conversion of numbers that the narrow type can hold (masks, one-hot rows, token numbers), sums of a mask, and copies and views
    are not reported. What depends only on constants and buffers, such as a table of positions, belongs to the function, as it is
    stored. A module in float32 is watched in the same way for the types that are narrower than that.

    Reported besides: operators of other libraries (``torch.library``), higher-order operators and reinterpreted bits, since nothing is
    seen inside them; numbers that enter from outside of torch (NumPy, Python lists) and change with the inputs or the parameters
    (``numbers_from_outside``). A conversion to integers is not a narrowing: the integers are exact, and the function, which jumps,
    is another matter. Two round trips leave no trace: NumPy arrays that share memory with a tensor and are changed in place, and
    Python numbers that are rounded between ``.item()`` and their use.

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
            with self:
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
        kwargs = dict(kwargs or {})
        given, schema = _tensors((args, kwargs)), getattr(func, "_schema", None)
        depends = any([self._depends(tensor) for tensor in given])  # a list: all of them are noted
        depends = depends and (schema is None or schema.name not in SHAPE_ONLY)
        if schema is None or func.namespace not in WATCHED or func is torch.ops.aten.view.dtype:
            result = func(*args, **kwargs)
            made = _tensors(result)
            if depends and any(_floating(tensor) for tensor in (*given, *made)):
                self._add("does what cannot be watched", str(func), None)
        else:
            # What an operator overwrites is needed once more if it rounds.
            spare = tree_map(_copied, (args, kwargs)) if depends and schema.is_mutable else (args, kwargs)
            result = func(*args, **kwargs)
            made = _tensors(result) or (given if schema.is_mutable else [])
            narrow = [tensor.dtype for tensor in made if _narrow(tensor) and _bits(tensor.dtype) < self._bits]
            if depends and narrow and not func.is_view and _rounds(func, *spare, made):
                coarse = max(narrow, key=lambda dtype: Narrowing("", "", "", dtype).unit)
                self._add(f"computes in {coarse}", schema.name, coarse)
        for tensor in (*made, *(given if depends and (schema is None or schema.is_mutable) else ())):
            self._note(tensor, depends)
        return result

    def _add(self, what: str, operator: str, dtype: torch.dtype | None) -> None:
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is not None:
            module = f"the backward pass, in {node.name()},"
        elif self._inside and self._inside[-1]:
            module = repr(self._inside[-1])
        else:
            module = "the forward of the network itself"
        self._seen.setdefault(Narrowing(module, what, operator, dtype))

    def _depends(self, tensor: Tensor) -> bool:
        """Return whether the numbers depend on inputs or parameters; note floating ones of an unknown origin."""
        key = _storage(tensor)
        if key is None:
            return True
        known = self._known.get(key.cdata)
        if known is not None:
            return known[1]
        if _floating(tensor) and tensor.numel():
            self._from_outside.append(_digest(tensor))
        self._known[key.cdata] = key, False
        return False

    def _note(self, tensor: Tensor, depends: bool) -> None:
        key = _storage(tensor)
        if key is not None and (depends or key.cdata not in self._known):
            self._known[key.cdata] = key, depends
        if len(self._known) > self._room:
            self._known = {address: known for address, known in self._known.items() if not known[0].expired()}
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

    A tensor that no operator made is a stored constant, or comes from NumPy or a Python list, where it may have been
    computed in any type. Constants are the same in a second forward, with the samples in another order and other parameters; what
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
    return Narrowing("the network", "uses numbers that were computed outside of torch", "NumPy or Python", None)


def _moved(samples: Tensor) -> Tensor:
    """Return the samples in another order or, if they are all equal, other ones."""
    flipped = samples.flip(0)
    return samples * CHANGE if _floating(samples) and torch.equal(flipped, samples) else flipped


def _from_outside(module: StatelessModule, parameters: Mapping[str, Tensor], inputs: Inputs) -> tuple[str, ...] | None:
    """Return the digests of what enters a forward from outside of torch; None: the forward fails."""
    watch = NarrowWatch(module, inputs, parameters=parameters)
    try:
        with watch.watching():
            module.call(parameters, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError):
        return None
    return watch.from_outside


def _rounds(func: Any, args: Any, kwargs: Any, made: Sequence[Tensor]) -> bool:
    """Return whether the results are not those of the same operator on the same numbers in float64."""
    if torch.Tag.nondeterministic_seeded in func.tags:  # calling it again would move the generator
        return True
    for convert in (_widened, _all_widened):
        wide = tree_map(convert, (args, kwargs))
        try:
            result = func(*wide[0], **wide[1])
            again = _tensors(result) or _tensors(wide)
            if any(_narrow(tensor) for tensor in again):
                continue  # integers that are divided give the default type
            return len(made) != len(again) or not all(map(_same, made, again))
        except (RuntimeError, TypeError, ValueError, IndexError):  # no such operator in float64: nothing is shown
            return True
    return True


def _same(narrow: Tensor, wide: Tensor) -> bool:
    if narrow.shape != wide.shape:
        return False
    narrow, wide = _strided(_widened(narrow)), _strided(wide)
    return bool(((narrow == wide) | ((narrow != narrow) & (wide != wide))).all())


def _widened(value: Any) -> Any:
    """Return a narrow tensor, or the name of a narrow type, in float64 or complex128; anything else as it is."""
    if isinstance(value, torch.dtype):
        return _wide(value) if value.is_floating_point or value.is_complex else value
    return _dense(value).to(_wide(value.dtype)) if isinstance(value, Tensor) and _narrow(value) else value


def _all_widened(value: Any) -> Any:
    integers = isinstance(value, Tensor) and not _floating(value)
    return value.to(torch.float64) if integers else _widened(value)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


def _strided(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and _narrow(value) else value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized


def _narrow(tensor: Tensor) -> bool:
    return _floating(tensor) and tensor.dtype not in (torch.float64, torch.complex128)


def _bits(dtype: torch.dtype) -> int:
    known = dtype.is_floating_point or dtype.is_complex
    return torch.finfo(dtype.to_real() if dtype.is_complex else dtype).bits if known else 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    """Return the memory that the numbers are in; None: they have none of their own (sparse ones)."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def _digest(tensor: Tensor) -> str:
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else _dense(tensor).resolve_neg()
    raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest() + str(tuple(tensor.shape))
