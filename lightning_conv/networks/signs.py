"""Signs for all weights: which results of a network are positive whatever its weights are, so that a root is analytic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


def names_in(text: str) -> frozenset[str]:
    """Return the words of ``text``."""
    return frozenset(text.split())


class Sign(IntEnum):
    """What is known of the entries of a tensor at every weight; the smaller of two is what is known of both."""

    ANY = 0
    NONNEGATIVE = 1
    POSITIVE = 2


@dataclass(frozen=True)
class Call:
    """One call of an operator of aten, before it runs."""

    name: str
    """Functional name without namespace: ``add`` for ``aten::add_.Tensor``."""
    overload: str
    given: Mapping[str, object]
    """Arguments by their names in the schema, with defaults."""
    depends: Callable[[object], bool]
    """Whether a tensor depends on the weights."""
    known: Callable[[Tensor], Sign]
    """Sign at every weight of a tensor that depends on them."""
    dtype: torch.dtype
    """Type of the evaluation."""
    present: bool
    """Whether the weights are the network's own."""

    def get(self, name: str) -> object:
        """Return an argument; None where the operator has none of that name."""
        return self.given.get(name)

    def sign(self, name: str) -> Sign:
        """Return the sign of an argument at every weight."""
        return self.sign_of(self.given.get(name))

    def sign_of(self, value: object) -> Sign:
        """Return the sign at every weight of a number, a tensor, or all tensors of a list."""
        if isinstance(value, int | float):
            return Sign.POSITIVE if value > 0 else Sign.NONNEGATIVE if value == 0 else Sign.ANY
        if isinstance(value, list | tuple):
            return min((self.sign_of(each) for each in value), default=Sign.ANY)
        if not isinstance(value, Tensor) or value.is_complex() or not value.numel():
            return Sign.ANY
        if self.depends(value):
            return self.known(value)
        if value.layout != torch.strided or value.is_quantized:
            return Sign.ANY
        smallest = float(value.detach().double().min())  # the same at all weights
        return Sign.POSITIVE if smallest > 0 else Sign.NONNEGATIVE if smallest == 0 else Sign.ANY


_POSITIVE = names_in("exp exp2 sigmoid cosh erfc")
_NONNEGATIVE = names_in("square var mse_loss")
_KEPT = names_in(
    "view _unsafe_view reshape _reshape_alias t transpose permute expand slice select unsqueeze squeeze unbind split "
    "split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk clone detach alias flip roll repeat as_strided "
    "unfold diagonal index_select gather index pixel_shuffle pixel_unshuffle channel_shuffle lift_fresh _to_copy sum mean "
    "cumsum prod cumprod reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d rsqrt reciprocal sqrt log1p masked_select"
)
"""Operators whose results have the sign of ``self``, where they are analytic."""
_ARRANGED = {
    "cat": ("tensors",),
    "stack": ("tensors",),
    "where": ("self", "other"),
    "masked_fill": ("self", "value"),
    "constant_pad_nd": ("self", "value"),
    "copy": ("src",),
    "fill": ("value",),
    "embedding": ("weight",),
}
"""Operators whose results consist of entries of these arguments."""
_PRODUCTS = {"mm": "mat2", "bmm": "mat2", "mv": "vec", "dot": "tensor", "mul": "other"}
_WITH_ZEROS = names_in(
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d tril triu diag_embed"
)


def sign_of_result(call: Call) -> Sign:
    """Return the sign, at every weight, of the real result of an analytic operator.

    The rules: exp, sigmoid and softplus are positive, squares and variances nonnegative; sums and products of positive
    numbers are positive; a nonnegative and a positive number have a positive sum. They are statements about real numbers: the
    exp of a very negative float is 0.
    """
    name, own = call.name, call.sign("self")
    if name in _POSITIVE:
        return Sign.POSITIVE
    if name in _NONNEGATIVE:
        return Sign.NONNEGATIVE
    if name == "softplus":
        return Sign.POSITIVE if call.sign("beta") is Sign.POSITIVE else Sign.ANY
    if name in {"_softmax", "_safe_softmax"}:  # a masked logit of -inf gives 0
        logits = call.get("self")
        finite = isinstance(logits, Tensor) and bool(torch.isfinite(logits).all())
        return Sign.POSITIVE if finite else Sign.NONNEGATIVE
    if name == "pow":
        return _of_power(call)
    if name in _KEPT:
        return own
    if name in _ARRANGED:
        return min(call.sign(each) for each in _ARRANGED[name])
    if name in _WITH_ZEROS:
        return min(own, Sign.NONNEGATIVE)
    if name in _PRODUCTS:
        other = call.get(_PRODUCTS[name])
        square = name == "mul" and _same(call.get("self"), other)
        return max(min(own, call.sign_of(other)), Sign.NONNEGATIVE if square else Sign.ANY)
    if name == "div":
        return min(own, call.sign("other")) if call.sign("other") is Sign.POSITIVE else Sign.ANY
    if name == "add":
        added, alpha = call.sign("other"), call.sign("alpha")
        known = Sign.ANY not in (own, added) and alpha is Sign.POSITIVE
        return max(own, added) if known else Sign.ANY
    return Sign.ANY


def _of_power(call: Call) -> Sign:
    base, exponent = call.get("self"), call.get("exponent")
    if call.sign("self") is Sign.POSITIVE:
        return Sign.POSITIVE
    even = isinstance(exponent, int | float) and float(exponent) % 2 == 0 and float(exponent) >= 0
    real = isinstance(base, Tensor) and base.is_floating_point()
    return Sign.NONNEGATIVE if even and real else Sign.ANY


def _same(a: object, b: object) -> bool:
    """Return whether two real tensors are the same entries of memory."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and a.shape == b.shape):
        return False
    return a is b or (a.dtype == b.dtype and a.stride() == b.stride() and a.data_ptr() == b.data_ptr())
