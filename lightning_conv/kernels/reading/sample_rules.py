"""Where the samples are in what an operator returns, given where they are in what it takes: a rule for each kind of operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_conv.kernels.reading.sample_places import Along, CouplesError, Found, elementwise, is_constant, merged

Rule = Callable[[Mapping[str, Any], Any, Found, int], Sequence[Along | None]]
"""Takes the arguments by name, what was returned, where the samples are, and their number; returns where they are in each result."""


def _other(along: Along, dims: object, ndim: int) -> set[int]:
    """Return dimensions, counted from the front, none of which is that of the samples."""
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    found = {each % ndim for each in listed if isinstance(each, int)}
    if not found or along.dim in found:
        raise CouplesError
    return found


def _view(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    return [merged(found.of(given["self"]), given["self"].shape, result.shape, n)]


def _permute(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    along = found.of(given["self"])
    order = [each % result.ndim for each in given["dims"]]
    return [Along(order.index(along.dim), along.inner)]


def _transpose(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    along, ndim = found.of(given["self"]), result.ndim
    one, other = given.get("dim0", 0) % max(ndim, 1), given.get("dim1", ndim - 1) % max(ndim, 1)
    return [Along({one: other, other: one}.get(along.dim, along.dim), along.inner)]


def _unsqueeze(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    along = found.of(given["self"])
    return [Along(along.dim + (given["dim"] % result.ndim <= along.dim), along.inner)]


def _squeeze(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    tensor, along = given["self"], found.of(given["self"])
    dims = given.get("dim")
    listed = range(tensor.ndim) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = sum(tensor.shape[each] == 1 and each % tensor.ndim < along.dim for each in listed)
    return [Along(along.dim - gone, along.inner)]


def _expand(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    along = found.of(given["self"])
    return [Along(along.dim + result.ndim - given["self"].ndim, along.inner)]


def _select(given: Mapping[str, Any], result: Any, found: Found, n: int) -> list[Along | None]:
    tensor, along = given["self"], found.of(given["self"])
    (dim,) = _other(along, given.get("dim", 0), tensor.ndim)
    results = result if isinstance(result, (list, tuple)) else [result]
    return [Along(along.dim - (dim < along.dim), along.inner)] * len(results)


def _slice(given: Mapping[str, Any], result: Any, found: Found, n: int) -> list[Along | None]:
    tensor, along = given["self"], found.of(given["self"])
    results = result if isinstance(result, (list, tuple)) else [result]
    whole = given.get("step", 1) == 1 and all(each.shape == tensor.shape for each in results)
    if not whole:
        _other(along, given.get("dim", 0), tensor.ndim)
    return [along] * len(results)


def _cat(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    tensors = [each for each in given["tensors"] if each.ndim == given["tensors"][0].ndim]
    if len(tensors) < len(given["tensors"]):
        raise CouplesError
    along = elementwise(tensors, tensors[0], found)
    if "stack" in given:
        dim = given.get("dim", 0) % result.ndim
        return [Along(along.dim + (dim <= along.dim), along.inner)]
    _other(along, given.get("dim", 0), result.ndim)
    return [along]


def _product(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    """Rows of the first factor, columns of the second, or matrices of a batch belong to samples; never what is summed over."""
    one = given.get("mat1", given.get("batch1", given.get("input", given.get("self"))))
    other = given.get("mat2", given.get("batch2", given.get("weight", given.get("vec"))))
    left, right = found.along(one), found.along(other)
    transposed = "weight" in given  # torch.nn.functional.linear
    if left is not None and right is not None:
        batched = one.ndim == 3 and other.ndim == 3 and left == right and left.dim == 0
        along = left if batched else None
    elif left is not None:
        along = left if left.dim < one.ndim - 1 and (left.dim > 0 or one.ndim < 3 or transposed) else None
    else:
        along = (
            right if right is not None and not transposed and right.dim == other.ndim - 1 and other.ndim > 1 else None
        )
    if along is None:
        raise CouplesError
    added = given.get("bias") if transposed else given.get("self") if one is not given.get("self") else None
    if isinstance(added, Tensor):
        found.none(added)
        place = result.ndim - along.dim
        if added.ndim >= place and not is_constant(added, added.ndim - place):
            raise CouplesError
    return [along]


def _convolution(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    along = found.of(given["input"])
    found.none(given["weight"], given.get("bias"))
    if along.dim != 0 or given["input"].ndim != result.ndim or given["weight"].ndim != result.ndim:
        raise CouplesError
    return [along]


def _reduced(given: Mapping[str, Any], result: Any, found: Found, n: int) -> list[Along | None]:
    tensor, along = given["self"], found.of(given["self"])
    gone = _other(along, given.get("dim"), tensor.ndim)
    results = result if isinstance(result, (list, tuple)) else [result]
    if results[0].ndim == tensor.ndim:
        return [along] * len(results)
    return [Along(along.dim - sum(each < along.dim for each in gone), along.inner)] * len(results)


def _layer_norm(given: Mapping[str, Any], result: Sequence[Tensor], found: Found, n: int) -> list[Along | None]:
    along = found.of(given["input"])
    found.none(given.get("weight"), given.get("bias"))
    if along.dim >= given["input"].ndim - len(given["normalized_shape"]):
        raise CouplesError
    return [along] * len(result)


def _of_channels(given: Mapping[str, Any], result: Sequence[Tensor], found: Found, n: int) -> list[Along | None]:
    """Normalise by given statistics, or by those of groups of channels of a sample."""
    along = found.of(given["input"])
    found.none(*(each for name, each in given.items() if name != "input"))
    if along.dim != 0 or given.get("training", False) or given.get("N", len(given["input"])) != len(given["input"]):
        raise CouplesError
    return [along, *[None] * (len(result) - 1)]


def _pooled(given: Mapping[str, Any], result: Any, found: Found, n: int) -> list[Along | None]:
    tensor, along = given["self"], found.of(given["self"])
    results = result if isinstance(result, (list, tuple)) else [result]
    if along.dim != 0 or any(each.ndim != tensor.ndim or each.shape[0] != tensor.shape[0] for each in results):
        raise CouplesError
    return [along] * len(results)


def _embedding(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    found.none(given["weight"])
    return [found.of(given["indices"])]


def _attention(given: Mapping[str, Any], result: Sequence[Any], found: Found, n: int) -> list[Along | None]:
    places = [found.of(given[name]) for name in ("query", "key", "value")]
    if len(set(places)) != 1 or places[0].dim > 1 or given["query"].ndim != 4:
        raise CouplesError
    mask = given.get("attn_mask", given.get("attn_bias"))
    if isinstance(mask, Tensor):
        place = 4 - places[0].dim
        own = found.along(mask)
        if own is not None and (mask.ndim - own.dim, own.inner) != (place, places[0].inner):
            raise CouplesError
        if own is None and mask.ndim >= place and not is_constant(mask, mask.ndim - place):
            raise CouplesError
    if given.get("dropout_p", 0.0):
        raise CouplesError
    return [places[0], *[None] * (len(result) - 1)]


def _padded(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    along = found.of(given["self"])
    if along.dim >= given["self"].ndim - len(given["pad"]) // 2:
        raise CouplesError
    return [along]


def _moved(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    along = found.of(given["self"])
    _other(along, given["dims"], result.ndim)
    return [along]


def _same(given: Mapping[str, Any], result: Tensor, found: Found, n: int) -> list[Along | None]:
    return [found.of(given["self"])]


_RULES: Mapping[Rule, str] = {
    _view: "view _unsafe_view reshape _reshape_alias",
    _permute: "permute",
    _transpose: "transpose t",
    _unsqueeze: "unsqueeze",
    _squeeze: "squeeze",
    _expand: "expand",
    _select: "select unbind",
    _slice: "slice split split_with_sizes unsafe_split",
    _cat: "cat stack",
    _product: "mm addmm bmm baddbmm linear",
    _convolution: "convolution _convolution mkldnn_convolution cudnn_convolution",
    _reduced: "sum mean amax amin prod var std logsumexp max min argmax argmin any all linalg_vector_norm norm "
    "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod topk sort glu",
    _layer_norm: "native_layer_norm",
    _of_channels: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_batch_norm_no_update native_group_norm",
    _pooled: "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool2d mkldnn_max_pool2d upsample_nearest2d upsample_bilinear2d",
    _embedding: "embedding",
    _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_attention_math",
    _padded: "constant_pad_nd",
    _moved: "flip roll",
    _same: "detach alias _to_copy zeros_like ones_like full_like zero fill",
}
RULES: Mapping[str, Rule] = {name: rule for rule, names in _RULES.items() for name in names.split()}
"""The rules by the name of the operator, without the underscore of those that write in place."""

ELEMENTWISE = frozenset({"copy", "hardswish", "log_sigmoid_forward"})
"""Operators that act on each number by itself although torch does not tag them so."""
