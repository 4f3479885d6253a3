r"""``linearisation_error``: how far the network linearised at the start is from the network itself, where the run has come to.

Source: Lee et al. 2019 (1902.06720, equation 3 and figure 3: the linearised network beside the real one); Chizat, Oyallon, Bach 2019
(1812.07956, section 1: lazy training is the one that the linearisation describes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.arguments import require_option, require_type
from lightning_conv.kernels.products.jacobian_map import JacobianMap
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs, sample_count
from lightning_conv.networks.supported import require_module

UNITS = 16
"""Units in the last place by which outputs are off, roughly."""


@dataclass(frozen=True, kw_only=True)
class Linearisation:
    """The network linearised at the start, at the weights of now.

    Attributes:
        error: |f(w) - f(w_0) - J_0 (w - w_0)| / |f(w) - f(w_0)| over all samples and outputs; NaN: the outputs have not moved.
        moved: |f(w) - f(w_0)|.
        rounding: Share of ``moved`` that rounding explains, roughly: so far the error may be off.
    """

    error: float
    moved: float
    rounding: float


def linearisation_error(
    model: nn.Module,
    inputs: Inputs,
    start: Mapping[str, Tensor],
    *,
    batch_norm: BatchNormMode = "eval",
    dtype: torch.dtype | None = None,
    max_memory: float | None = None,
) -> Linearisation:
    r"""Compare what the outputs have done since the start with what the network linearised there does under the same movement.

    .. math:: \frac{|f(w) - f(w_0) - J_0 (w - w_0)|}{|f(w) - f(w_0)|}, \qquad J_0 = \partial f / \partial w \, (w_0)

    It is 0 for a network that is linear in these weights, and tends to 0 with the width in the parametrisation of the tangent kernel. It
    says nothing of how w was reached: a forecast of the run from the kernel of the start may be wrong although this error is small.

    Buffers, such as running statistics of BatchNorm, and weights that are not in ``start`` are those of now in all three terms.

    Args:
        model: The network at the weights w of now; it is not changed.
        inputs: n samples.
        start: w_0, by the names of the parameters that have moved, in their shapes.
        batch_norm: As in ``NTKOperator``: ``"batch"`` takes the statistics of these samples, as a training step does, and
            differentiates through them. ``"frozen"`` would hold those of now in J_0, and is refused.
        dtype: None: the type of the network; ``torch.float64``: a converted copy.
        max_memory: As in ``NTKOperator``.

    Returns:
        The error, with what rounding may do to it.

    Raises:
        ValueError: ``batch_norm="frozen"``; ``start`` is empty, has an unknown name or another shape; otherwise as ``NTKOperator``.
        TypeError: The model is no module, the inputs are no tensors, or the weights of the start do not come by name.
        MemoryError, RuntimeError: As ``NTKOperator``.

    Cost: about nine forward passes and a forward derivative (two more), copies of the weights and of their movement.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> found = linearisation_error(layer, torch.eye(2), {"weight": torch.zeros(1, 2)})
        >>> found.error < 1e-6
        True
    """
    if batch_norm == "frozen":
        raise ValueError(
            'batch_norm: "frozen" would hold the statistics of now at the start as well; use "batch" or "eval"'
        )
    require_module(model)
    require_option("batch_norm", batch_norm, ("eval", "batch"))
    sample_count(inputs)
    require_type(
        "start", start, Mapping, "weights of the start by name, such as a copy of dict(model.named_parameters())"
    )
    named = dict(model.named_parameters())
    for name, values in start.items():
        require_type(f"start[{name!r}]", values, Tensor, "a tensor of the shape of the parameter")
        if name not in named or named[name].shape != values.shape:
            was = f"of shape {tuple(named[name].shape)}" if name in named else "missing in the model"
            raise ValueError(f"start: {name!r} has the shape {tuple(values.shape)}, and the parameter is {was}")
    if not start:
        raise ValueError("start: no weights; need the names and values of those that have moved")
    network = JacobianMap(
        model,
        inputs,
        parameters=list(start),
        batch_norm=batch_norm,
        dtype=dtype,
        max_memory=max_memory,
        chunk=None,
    )
    now = network.values()
    at = {name: network.module.parameters[name].double() for name in start}
    moved = {name: (each - start[name].to(each))[None] for name, each in at.items()}
    network.move(start)
    first = network.values()
    change = now - first
    pushed = network.push(moved, lambda images, _: images)[0]
    size = float(change.norm())
    eps = torch.finfo(network.module.dtype).eps
    rounding = UNITS * eps * float(now.norm() + first.norm() + pushed.norm()) / size if size else math.inf
    error = float((change - pushed).norm()) / size if size else math.nan
    return Linearisation(error=error, moved=size, rounding=rounding)
