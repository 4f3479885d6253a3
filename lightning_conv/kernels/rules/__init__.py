"""Layer rules: the derivatives by a layer's parameters, from the input of the layer and the gradient of its output."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.kernels.rules.convolution import ConvolutionRule, TransposedConvolutionRule
from lightning_conv.kernels.rules.elementwise import DifferenceRule, ExpandRule, ProductRule, SumRule
from lightning_conv.kernels.rules.embedding import EmbeddingRule
from lightning_conv.kernels.rules.linear import LinearRule
from lightning_conv.kernels.rules.normalisation import BatchNormRule, NormalisationRule
from lightning_conv.kernels.rules.recurrent import UNROLLED
from lightning_conv.kernels.rules.registry import Arguments, LayerRule, OuterRule, register_rule, rule_of

__all__ = ["UNROLLED", "Arguments", "EmbeddingRule", "LayerRule", "OuterRule", "register_rule", "rule_of"]

register_rule(F.linear, LinearRule())
for _dimensions, _forward, _transposed in (
    (1, F.conv1d, F.conv_transpose1d),
    (2, F.conv2d, F.conv_transpose2d),
    (3, F.conv3d, F.conv_transpose3d),
):
    register_rule(_forward, ConvolutionRule(_dimensions))
    register_rule(_transposed, TransposedConvolutionRule(_dimensions))
register_rule(F.embedding, EmbeddingRule())
register_rule(F.batch_norm, BatchNormRule())
for _function, _signature, _channels in (
    (F.instance_norm, "input running_mean running_var weight bias use_input_stats momentum eps", True),
    (F.group_norm, "input num_groups weight bias eps", True),
    (F.layer_norm, "input normalized_shape weight bias eps", False),
    (F.rms_norm, "input normalized_shape weight eps", False),
):
    register_rule(_function, NormalisationRule(_function, _signature, channels=_channels))
# Operators reach the dispatch of torch as methods of Tensor: x + p as Tensor.add.
for _functions, _rule in (
    ((torch.add, Tensor.add), SumRule()),
    ((torch.sub, Tensor.sub), DifferenceRule()),
    ((torch.mul, Tensor.mul), ProductRule()),
    ((Tensor.expand, Tensor.expand_as), ExpandRule()),
):
    for _each in _functions:
        register_rule(_each, _rule)
