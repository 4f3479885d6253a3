"""The operators of aten that are real-analytic in arguments that depend on the weights; all others are unknown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_conv.networks.signs import Call, Sign, names_in


def _each(names: Mapping[str, str]) -> dict[str, str]:
    return {name: what for what, several in names.items() for name in several.split()}


KINKED = _each(
    {
        "ReLU": "relu",
        "threshold": "threshold",
        "clamp": "clamp clamp_min clamp_max",
        "hard tanh or ReLU6": "hardtanh",
        "leaky ReLU": "leaky_relu",
        "RReLU": "rrelu_with_noise rrelu_with_noise_functional",
        "PReLU": "_prelu_kernel",
        "ELU, SELU or CELU": "elu celu selu",
        "hard swish": "hardswish",
        "hard sigmoid": "hardsigmoid",
        "hard shrink": "hardshrink",
        "soft shrink": "softshrink",
        "absolute value": "abs",
        "sign": "sign sgn signbit heaviside copysign",
        "rounding": "floor ceil round trunc frac floor_divide remainder fmod",
        "maximum": "maximum max amax fmax cummax aminmax _aminmax",
        "minimum": "minimum min amin fmin cummin",
        "median": "median nanmedian",
        "sorting": "sort topk kthvalue mode",
        "choice by size": "argmax argmin argsort bucketize searchsorted",
        "max pooling": "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices mkldnn_max_pool2d mkldnn_max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d",
        "comparison": "gt ge lt le eq ne isclose isnan isinf isfinite",
        "norm": "norm linalg_vector_norm _cdist_forward _pdist_forward renorm embedding_renorm",
        "weight norm, a division by a norm": "_weight_norm _weight_norm_interface",
        "standard deviation": "std std_mean",
        "smooth L1 or Huber loss": "smooth_l1_loss huber_loss",
    }
)
"""Operators with kinks, jumps or higher derivatives that jump, and their usual names."""

_ELEMENTWISE = (
    "add sub rsub mul neg positive square addcmul lerp exp exp2 expm1 sin cos sinh cosh tanh sigmoid erf erfc erfcx "
    "special_erfcx atan asinh sinc special_ndtr special_log_ndtr special_bessel_j0 special_bessel_j1 special_i1 i0 logaddexp "
    "logaddexp2 gelu silu mish glu log_sigmoid_forward mse_loss binary_cross_entropy_with_logits"
)
_LINEAR_ALGEBRA = (
    "mm bmm mv dot vdot addmm addmv addbmm baddbmm addr linear matmul linalg_cross trace linalg_matrix_exp _trilinear "
    "convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution cudnn_convolution_transpose"
)
_REDUCTIONS = (
    "sum mean prod var var_mean cumsum cumprod logsumexp logcumsumexp _softmax _log_softmax _safe_softmax nll_loss_forward "
    "nll_loss2d_forward avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d"
)
_ARRANGEMENTS = (
    "view _unsafe_view reshape _reshape_alias t transpose permute expand slice select unsqueeze squeeze unbind split "
    "split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk clone detach alias flip roll repeat as_strided unfold "
    "diagonal diag_embed tril triu index_select gather index _unsafe_index index_put _unsafe_index_put index_add index_copy "
    "index_fill scatter scatter_add slice_scatter select_scatter diagonal_scatter masked_select masked_scatter masked_fill where "
    "embedding cat stack constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im copy fill zero "
    "lift_fresh _to_copy upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa"
)
_COMPLEX = "view_as_real view_as_complex _conj _conj_physical conj_physical resolve_conj resolve_neg _neg_view complex polar real imag"
_FOURIER = "_fft_r2c _fft_c2r _fft_c2c"
_LAYERS = "_thnn_fused_lstm_cell _thnn_fused_gru_cell"

ANALYTIC = names_in(f"{_ELEMENTWISE} {_LINEAR_ALGEBRA} {_REDUCTIONS} {_ARRANGEMENTS} {_COMPLEX} {_FOURIER} {_LAYERS}")
"""Operators that are real-analytic in all their floating arguments on the whole space. Indices and masks are held fixed."""

COMPLEX_ANALYTIC = names_in(
    f"add sub rsub mul neg positive square addcmul lerp exp expm1 sin cos sinh cosh sum mean prod cumsum cumprod "
    f"{_LINEAR_ALGEBRA} {_ARRANGEMENTS} {_COMPLEX} {_FOURIER}"
)
"""Those of ``ANALYTIC`` that are so for complex numbers too: tanh, for one, has poles there."""

SHAPE_ONLY = names_in(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided _fused_sdp_choice "
    "is_same_size is_pinned rand_like randn_like randint_like"
)
"""Operators that read the shape of their tensors and no entry."""

_READ = names_in("_local_scalar_dense equal allclose is_nonzero")

SAME_IN_FLOAT32, SAME_IN_FLOAT64 = 15.0, 37.0
"""Arguments t from which ln(1 + exp(t)) rounds to t: exp(-15) = 3.1e-7 is below half a unit in the last place of 15."""


def same_from(dtype: torch.dtype) -> float:
    """Return the threshold from which both branches of torch's softplus round to one number in a type."""
    return SAME_IN_FLOAT64 if dtype == torch.float64 else SAME_IN_FLOAT32


def turns_linear(beta: float, threshold: float, same: float, largest: float | None) -> str | None:
    """Say why torch's softplus, which is z where beta z > ``threshold``, is not ln(1 + exp(beta z)) / beta; None: it is.

    The two branches differ by ln(1 + exp(-threshold)) / beta at the threshold. They are one function, to the last bit, from
    ``same`` on. Below, down to 15, softplus is the formula as long as no beta z seen is beyond the threshold.

    Args:
        beta: sharpness.
        threshold: threshold of beta z.
        same: threshold from which they are one function, see ``same_from``.
        largest: largest beta z that was seen; None: none was looked at.
    """
    if threshold >= same:
        return None
    said = f"softplus (beta={beta:g}) that turns linear at beta z = {threshold:g}"
    if threshold < SAME_IN_FLOAT32 or largest is None:
        return said
    return None if largest <= threshold else f"{said}, where beta z = {largest:.3g} was seen"


Found: TypeAlias = tuple[str, bool]
"""What is not analytic, and whether that is known; else it is only not known to be analytic."""


def judge(call: Call) -> Found | None:
    """Say why an operator of aten with arguments that depend on the weights is not known to be real-analytic; None: it is."""
    name = call.name
    if name in KINKED:
        return KINKED[name], True
    if name not in COMPLEX_ANALYTIC and _complex(call) and (name != "div" or call.depends(call.get("other"))):
        return f"unknown operator aten::{name} of complex numbers", False
    if name == "view" and call.overload == "dtype":
        return "the bits of a number read as another type", True
    if name in _READ:
        return f"a value read by Python (aten::{name})", False
    if name in ANALYTIC:
        return None
    rule = _RULES.get(name)
    return rule(call) if rule is not None else (f"unknown operator aten::{name}", False)


def _complex(call: Call) -> bool:
    return any(
        isinstance(value, Tensor) and value.is_complex() and call.depends(value) for value in call.given.values()
    )


_Rule: TypeAlias = Callable[[Call], Found | None]


def _where(argument: str, least: Sign, what: str) -> _Rule:
    """Allow an operator where an argument has a sign at every weight."""
    need = "positive" if least is Sign.POSITIVE else "nonnegative"

    def rule(call: Call) -> Found | None:
        fine = not call.depends(call.get(argument)) or call.sign(argument) >= least
        return None if fine else (f"{what} of values not known to be {need} at every weight", False)

    return rule


def _unless(bad: Callable[[Call], bool], what: str, known: bool = True) -> _Rule:
    """Allow an operator except with some arguments."""
    return lambda call: (what, known) if bad(call) else None


def _division(call: Call) -> Found | None:
    if call.get("rounding_mode") is not None:
        return "rounding", True
    if call.depends(call.get("other")) and call.sign("other") is not Sign.POSITIVE:
        return "division by values not known to be positive at every weight", False
    return None


def _power(call: Call) -> Found | None:
    base, exponent = call.get("self"), call.get("exponent")
    whole = isinstance(exponent, int | float) and float(exponent).is_integer() and exponent >= 0
    if whole or call.sign("self") is Sign.POSITIVE:
        return None
    if isinstance(exponent, Tensor) and not call.depends(exponent):
        steps = exponent.detach()
        if not steps.is_complex() and bool(((steps >= 0) & (steps == steps.round())).all()):
            return None
    what = "a power" if isinstance(base, Tensor) else "a power of a number"
    return f"{what} that is analytic for a positive base only, not known to be positive at every weight", False


def _softplus(call: Call) -> Found | None:
    z, beta, threshold = call.get("self"), call.get("beta"), call.get("threshold")
    assert isinstance(z, Tensor)
    assert isinstance(beta, int | float)
    assert isinstance(threshold, int | float)
    same = same_from(call.dtype)
    largest = float((z.detach() * float(beta)).max()) if call.present and z.numel() else -torch.inf
    why = turns_linear(float(beta), float(threshold), same, largest)
    return (why, True) if why else None


def _normalised(call: Call) -> Found | None:
    eps = call.given.get("eps", call.given.get("epsilon"))
    if isinstance(eps, int | float) and not eps > 0:
        return "normalisation with eps = 0", False
    if eps is None and call.name != "_fused_rms_norm":  # which then takes the type's own
        return f"unknown operator aten::{call.name}", False
    if call.depends(call.get("running_var")):
        return "normalisation by a variance that depends on the weights", False
    return None


_ROOTS = {
    "sqrt": "a square root",
    "rsqrt": "a reciprocal root",
    "reciprocal": "a reciprocal",
    "log": "a logarithm",
    "log2": "a logarithm",
    "log10": "a logarithm",
    "lgamma": "lgamma",
    "digamma": "digamma",
}
_NORMALISATIONS = names_in(
    "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_batch_norm_with_update _batch_norm_no_update cudnn_batch_norm miopen_batch_norm _fused_rms_norm"
)
_ATTENTION = names_in(
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math"
)
_RULES: dict[str, _Rule] = {
    **{name: _where("self", Sign.POSITIVE, what) for name, what in _ROOTS.items()},
    **{name: _normalised for name in _NORMALISATIONS},
    **{name: _unless(lambda call: bool(call.get("dropout_p")), "dropout", False) for name in _ATTENTION},
    "log1p": _where("self", Sign.NONNEGATIVE, "log1p"),
    "xlogy": _where("other", Sign.POSITIVE, "a logarithm"),
    "addcdiv": _where("tensor2", Sign.POSITIVE, "division by"),
    "div": _division,
    "pow": _power,
    "softplus": _softplus,
    "scatter_reduce": _unless(lambda call: call.get("reduce") in {"amax", "amin"}, "maximum or minimum"),
    "_embedding_bag": _unless(lambda call: call.get("mode") == 2, "maximum"),
    "_embedding_bag_forward_only": _unless(lambda call: call.get("mode") == 2, "maximum"),
    "mkldnn_rnn_layer": _unless(lambda call: call.get("mode") not in {2, 3}, "ReLU"),
    "_cudnn_rnn": _unless(lambda call: call.get("mode") not in {1, 2, 3} or bool(call.get("dropout")), "ReLU"),
    "grid_sampler_2d": _unless(lambda call: call.depends(call.get("grid")), "sampling at places that depend on the weights"),
    "grid_sampler_3d": _unless(lambda call: call.depends(call.get("grid")), "sampling at places that depend on the weights"),
}  # fmt: skip
"""Operators that are real-analytic for some arguments only."""
