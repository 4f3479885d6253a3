"""The size of the terms that add up to an output of a network: where they cancel, what remains of them is rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_conv.kernels.reading.recording import LayerCall
from lightning_conv.networks.evaluation import StatelessModule


def size_of_terms(module: StatelessModule, gradients: Mapping[str, Tensor | None], v: Tensor) -> float:
    r"""Return :math:`\sum_\theta |\partial (v \cdot u) / \partial \theta| \, |\theta| / |v|` over the parameters theta.

    Args:
        module: the network.
        gradients: those of v . u by the name of the parameter; None where the outputs do not depend on it.
        v: the combination of the outputs u, N x C.
    """
    sizes = [float(g.norm() * module.parameters[name].norm()) for name, g in gradients.items() if g is not None]
    return sum(sizes) / float(v.norm())


def size_of_products(calls: Sequence[LayerCall], gradients: Sequence[Tensor | None], v: Tensor) -> float:
    r"""Return :math:`\sum_l |\partial (v \cdot u) / \partial z_l| \, |W_l| \, |x_l| / |v|` over the layers :math:`z_l = W_l x_l + b_l`.

    Unlike the gradients of the parameters it sees a shift of :math:`x_l` that a later subtraction takes out of the output again.

    Args:
        calls: the layers; those whose rule knows no input and no weight do not count.
        gradients: the gradient of v . u in the output of each; None: there is none.
        v: the combination of the outputs u, N x C.
    """
    size = 0.0
    for call, gradient in zip(calls, gradients, strict=True):
        x, weight = call.arguments.get("input"), call.arguments.get("weight")
        if gradient is not None and isinstance(x, Tensor) and isinstance(weight, Tensor) and x.is_floating_point():
            size += float(gradient.norm() * weight.norm() * x.norm())
    return size / float(v.norm())
