"""The layers of torch that are real-analytic in their weights, by their exact type; all other types are unknown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from lightning_conv.networks.operators import Found, turns_linear
from lightning_conv.networks.signs import names_in

KINKED_LAYERS: Mapping[type[nn.Module], str] = {
    getattr(nn, kind): what
    for what, kinds in {
        "ReLU": "ReLU",
        "hard tanh or ReLU6": "ReLU6 Hardtanh",
        "leaky ReLU": "LeakyReLU",
        "RReLU": "RReLU",
        "PReLU": "PReLU",
        "threshold": "Threshold",
        "ELU, SELU or CELU": "ELU SELU CELU",
        "hard swish": "Hardswish",
        "hard sigmoid": "Hardsigmoid",
        "hard shrink": "Hardshrink",
        "soft shrink": "Softshrink",
        "max pooling": "MaxPool1d MaxPool2d MaxPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
        "FractionalMaxPool2d FractionalMaxPool3d",
    }.items()
    for kind in kinds.split()
}

_ALWAYS: frozenset[type[nn.Module]] = frozenset(
    getattr(nn, kind)
    for kind in names_in(
        "Identity Sequential ModuleList ModuleDict ParameterList ParameterDict Flatten Unflatten Linear Bilinear Conv1d Conv2d "
        "Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Dropout Dropout1d Dropout2d Dropout3d AlphaDropout "
        "FeatureAlphaDropout Tanh Sigmoid GELU SiLU Mish LogSigmoid Tanhshrink GLU Softmax Softmax2d LogSoftmax Softmin "
        "AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d Upsample UpsamplingNearest2d "
        "UpsamplingBilinear2d PixelShuffle PixelUnshuffle ChannelShuffle Fold Unfold ZeroPad1d ZeroPad2d ZeroPad3d "
        "ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d "
        "ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d LSTM GRU LSTMCell GRUCell "
        "MultiheadAttention TransformerEncoder TransformerDecoder Transformer"
    )
) | {NonDynamicallyQuantizableLinear}


def _positive(name: str) -> Callable[[Any], bool]:
    return lambda layer: getattr(layer, name) is None or getattr(layer, name) > 0


def _smooth_activation(layer: Any) -> bool:
    return layer.activation is F.gelu or type(layer.activation) is nn.GELU


_SOMETIMES: Mapping[type[nn.Module], tuple[Callable[[Any], bool], str]] = {
    **{
        getattr(nn, kind): (_positive("eps"), "normalisation with eps = 0")
        for kind in names_in(
            "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm LayerNorm GroupNorm InstanceNorm1d InstanceNorm2d "
            "InstanceNorm3d RMSNorm"
        )
    },
    nn.LocalResponseNorm: (lambda layer: layer.k > 0 and layer.alpha >= 0, "a power of values that may be 0"),
    nn.RNN: (lambda layer: layer.nonlinearity == "tanh", "ReLU"),
    nn.RNNCell: (lambda layer: layer.nonlinearity == "tanh", "ReLU"),
    nn.Embedding: (lambda layer: layer.max_norm is None, "norm"),
    nn.EmbeddingBag: (lambda layer: layer.max_norm is None and layer.mode != "max", "norm or maximum"),
    nn.TransformerEncoderLayer: (_smooth_activation, "ReLU or unknown activation"),
    nn.TransformerDecoderLayer: (_smooth_activation, "ReLU or unknown activation"),
}


def judge_layer(layer: nn.Module, same: float) -> Found | None:
    """Say why a layer, without its submodules, is not known to be real-analytic in the weights; None: its type is.

    The inputs of the layer are not known, so softplus is judged by its threshold alone.

    Args:
        layer: any module.
        same: threshold from which softplus is its formula, see ``turns_linear``.
    """
    kind = type(layer)
    if why := altered(layer):
        return f"unknown module {kind.__name__} ({why})", False
    if kind in KINKED_LAYERS:
        return KINKED_LAYERS[kind], True
    if isinstance(layer, nn.Softplus) and kind is nn.Softplus:
        said = turns_linear(layer.beta, layer.threshold, same, None)
        return (said, True) if said else None
    if kind in _SOMETIMES:
        fine, what = _SOMETIMES[kind]
        return None if fine(layer) else (what, True)
    return None if kind in _ALWAYS else (f"unknown module {kind.__name__}", False)


def altered(layer: nn.Module) -> str | None:
    """Say why a module may compute something else than its class; None: nothing of the kind is seen."""
    if "forward" in vars(layer):
        return "its forward was replaced"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    return "it is reparametrized" if is_parametrized(layer) else None
