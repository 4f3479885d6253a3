"""``WeightTrace``: follow what depends on the weights through one forward, and judge every operator that sees it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_conv.networks.narrow_memory import READERS
from lightning_conv.networks.operators import SHAPE_ONLY, judge
from lightning_conv.networks.signs import Call, Sign, names_in, sign_of_result

Finding: TypeAlias = tuple[str, str, bool]
"""Module, what is not analytic there, and whether that is known."""

Step: TypeAlias = tuple[str, str, object]
"""An operator that saw a weight, the module that called it, and what must be the same at other weights."""

_UNWRITTEN = names_in("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")
_OVERWRITING = names_in("copy fill zero")
_READERS = READERS | {getattr(Tensor, name) for name in names_in("tolist __reduce_ex__ __deepcopy__")}
"""Methods by which entries are read without an operator of torch."""


class WeightTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode of one forward that lists what is not known to be real-analytic in the weights.

    A tensor depends on the weights if its memory holds an entry that an operator computed from them, views and writes in
    place included. Operators that see no such tensor are constant in the weights, and only random numbers are listed. A
    value that Python reads (``item``, ``if``, ``numpy``) and memory that no operator of torch wrote are listed, because
    what is done with them is not seen.

    Operators that run in another thread are not seen. What they return shows as another computation at other weights; what
    they write in place into a tensor that depends on the weights does not.

    Every storage is kept until the trace is dropped, so that none is taken for another.

    Args:
        weights: all weights, in every copy that the forward may use.
        dtype: type of the evaluation; a narrower result is a cast.
        present: whether these are the network's own weights.
    """

    def __init__(self, weights: Iterable[Tensor], dtype: torch.dtype, *, present: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: list[str] = []
        """Modules whose forward is running, the innermost last."""
        self.found: dict[Finding, None] = {}
        self.steps: list[Step] = []
        self._dtype, self._present = dtype, present
        self._signs: dict[object, Sign] = {}
        self._kept: list[object] = []
        self._unwritten: set[object] = set()
        self._readers = _Readers(self)
        for weight in weights:
            self._mark(weight, Sign.ANY)

    def __enter__(self) -> WeightTrace:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._readers.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._readers.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    supports_higher_order_operators = True  # ``torch.cond`` and its kind are given to this mode too

    def depends(self, value: object) -> bool:
        """Return whether ``value`` is a tensor that depends on the weights."""
        return isinstance(value, Tensor) and _memory(value)[0] in self._signs

    def end(self, outputs: object) -> None:
        """Note what the network returned, which must be the same at other weights where it does not depend on them."""
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        fixed = tuple(tuple(leaf.shape) if self.depends(leaf) else _fingerprint(leaf) for leaf in leaves)
        self.steps.append(("the outputs", "", fixed))

    def note(self, what: str, known: bool) -> None:
        """List what is not analytic in the module that runs."""
        self.found[self.inside[-1] if self.inside else "", what, known] = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # reads of this mode are not those of the network
            return self._follow(func, args, dict(kwargs or {}))

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = tree_leaves((args, kwargs))
        if not isinstance(func, torch._ops.OpOverload):  # control flow and the like, given as a function
            return self._unknown(func, leaves, args, kwargs)
        namespace, _, name = func._schema.name.partition("::")
        name = name.removesuffix("_") if func._schema.is_mutable else name
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        seen = name not in SHAPE_ONLY and any(self.depends(tensor) for tensor in tensors)
        numbers = seen and any(_is_number(tensor) and self.depends(tensor) for tensor in tensors)
        given = {each.name: each.default_value for each in func._schema.arguments if each.has_default_value()}
        given |= dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        call = Call(name, func._overloadname, given, self.depends, self._sign, self._dtype, self._present)
        finding = None
        if torch.Tag.nondeterministic_seeded in func.tags and not _never_random(call):
            finding = (f"random numbers (aten::{name})", False)
        elif numbers:
            finding = judge(call) if namespace == "aten" else (f"unknown operator {func._schema.name}", False)
        written = _written(func, given)
        if not func.is_view and name not in SHAPE_ONLY:
            self._read(name, [tensor for tensor in tensors if not any(tensor is each for each in written)])
        if seen:
            self._record(func, leaves, written, name)
        sign = sign_of_result(call) if numbers and finding is None else Sign.ANY
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if numbers and finding is None:
            finding = self._read_or_rounded(name, result, outputs)
        if finding is not None:
            self.note(*finding)
        if name in _UNWRITTEN:
            self._kept += [_memory(output)[1] for output in outputs]
            self._unwritten |= {_memory(output)[0] for output in outputs}
        elif written:
            self._unwritten -= {_memory(tensor)[0] for tensor in written}
        if seen:
            for tensor in (*outputs, *written):
                self._mark(tensor, sign if tensor.is_floating_point() else Sign.ANY)
        return result

    def _unknown(self, func: Any, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.note(f"unknown operator {getattr(func, 'name', lambda: func)()}", False)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._mark(leaf, Sign.ANY)
        return result

    def _read_or_rounded(self, name: str, result: object, outputs: list[Tensor]) -> tuple[str, bool] | None:
        """Say that Python reads a value, or that a result is of a narrower type than the evaluation; None: neither."""
        if result is not None and not outputs:
            return f"a value read by Python (aten::{name})", False
        if not outputs:
            return None
        kind = outputs[0].dtype.to_real() if outputs[0].is_complex() else outputs[0].dtype
        if not kind.is_floating_point or torch.finfo(kind).eps > torch.finfo(self._dtype).eps:
            return f"rounding to {str(kind).removeprefix('torch.')}", True
        return None

    def _read(self, name: str, tensors: list[Tensor]) -> None:
        """List an operator that reads memory which was allocated and never written to, as far as torch knows."""
        if any(tensor.numel() and _memory(tensor)[0] in self._unwritten for tensor in tensors):
            self.note(f"memory that no operator of torch wrote (read by aten::{name})", False)

    def _record(self, func: Any, leaves: list[Any], written: list[Tensor], name: str) -> None:
        """Note the operator and all that it is given and does not depend on the weights."""
        fixed: list[object] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                fixed.append(repr(leaf))
            elif self.depends(leaf):
                fixed.append(tuple(leaf.shape))
            elif not func.is_view and not (name in _OVERWRITING and any(leaf is each for each in written)):
                fixed.append(_fingerprint(leaf) if _memory(leaf)[0] not in self._unwritten else None)
        self.steps.append((str(func), self.inside[-1] if self.inside else "", tuple(fixed)))

    def _sign(self, tensor: Tensor) -> Sign:
        return self._signs.get(_memory(tensor)[0], Sign.ANY)

    def _mark(self, tensor: Tensor, sign: Sign) -> None:
        """Note that the memory of ``tensor`` depends on the weights."""
        key, owner, whole = _memory(tensor)
        self._kept.append(owner)
        # Entries beside those written may be anything if they did not depend on the weights so far.
        self._signs[key] = sign if whole else min(sign, self._signs.get(key, Sign.ANY))


class _Readers(TorchFunctionMode):
    """Lists reads of entries that the dispatcher does not see."""

    def __init__(self, trace: WeightTrace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READERS and args and self._trace.depends(args[0]):
            self._trace.note(f"a value read by Python (Tensor.{func.__name__})", False)
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> tuple[object, object, bool]:
    """Return a name of the memory of a tensor, its owner, and whether the tensor covers all of it."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one
        return ("object", id(tensor)), tensor, True
    whole = tensor.numel() * tensor.element_size() == storage.nbytes() and tensor.is_contiguous()
    return storage._cdata, storage, whole


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _never_random(call: Call) -> bool:
    """Return whether an operator with random variants is given none of them."""
    rate = call.given.get("dropout_p", call.given.get("dropout"))
    return call.name == "rrelu_with_noise" or (rate is not None and not rate) or call.given.get("train") is False


def _written(func: Any, given: Mapping[str, object]) -> list[Tensor]:
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_leaves([given.get(name) for name in names]) if isinstance(leaf, Tensor)]


def _fingerprint(tensor: Tensor) -> object:
    """Return a checksum of the bytes of a tensor."""
    form = (tuple(tensor.shape), str(tensor.dtype))
    try:
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return *form, zlib.crc32(plain.view(torch.uint8).numpy().tobytes())
    except (NotImplementedError, RuntimeError, TypeError):
        return form
