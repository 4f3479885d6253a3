"""``trace_kernel``: the kernel of a case by autograd alone, in float64, one output at a time, on a copy of the module."""

import copy
from typing import Any

import torch
from case import Reading
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_conv.networks.observed.draws import Draws


def trace_kernel(module: nn.Module, reading: Reading, batch: Any) -> Tensor:
    """Return sum_c <du_c(x_i)/dw, du_c(x_j)/dw> over the trainable parameters w, (n, n).

    Dropout is off. BatchNorm normalises by the constant statistics of these samples, as ``Probe(batch_norm="frozen")`` documents. Random
    numbers are those that the call draws now, in the module's own type, and the same each time.
    """
    draws = Draws()
    with draws.recording():
        reading.call(copy.deepcopy(module).eval(), copy.deepcopy(batch))
    held = Draws([each.double() if each.is_floating_point() else each for each in draws.drawn])
    model = copy.deepcopy(module).double().eval()
    batch = apply_to_collection(batch, Tensor, lambda each: each.double() if each.is_floating_point() else each)
    with held.replaying():
        _keep_statistics(model, lambda: reading.call(model, copy.deepcopy(batch)))
    with held.replaying():
        outputs = reading.call(model, batch)
    outputs = outputs.reshape(len(outputs), -1)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name.startswith(reading.over)]
    kernel = torch.zeros(len(outputs), len(outputs), dtype=torch.float64)
    for column in range(outputs.shape[1]):
        gradients = []
        for row in range(len(outputs)):
            found = torch.autograd.grad(
                outputs[row, column], [p for _, p in named], retain_graph=True, allow_unused=True
            )
            gradients.append(torch.cat([_dense(g, p) for g, (_, p) in zip(found, named, strict=True)]))
        jacobian = torch.stack(gradients)
        kernel += jacobian @ jacobian.T
    return kernel


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros(parameter.numel(), dtype=torch.float64)
    return (gradient.to_dense() if gradient.is_sparse else gradient).double().flatten()


def _keep_statistics(model: nn.Module, run: Any) -> None:
    """Write the batch's own mean and biased variance into every BatchNorm layer, each on the inputs that the ones before it make."""

    def keep(layer: Any, args: tuple[Tensor, ...]) -> None:
        others = [axis for axis in range(args[0].ndim) if axis != 1]
        layer.running_mean = args[0].detach().mean(others)
        layer.running_var = args[0].detach().var(others, unbiased=False)

    layers = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    hooks = [each.register_forward_pre_hook(keep) for each in layers]
    if layers:
        run()
    for hook in hooks:
        hook.remove()
