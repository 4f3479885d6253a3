"""Per-sample Jacobians by ``torch.func``, for the parameters that no layer rule covers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vjp, vmap

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, map_inputs, sample_count, take


def jacobian_rows(
    module: StatelessModule, names: tuple[str, ...], inputs: Inputs, cotangents: Tensor
) -> dict[str, Tensor]:
    """Compute the rows c^T du_i/d(names) for each sample i and each cotangent c of it.

    Args:
        module: the network as a function.
        names: parameters to differentiate by.
        inputs: t samples.
        cotangents: combinations of outputs, (K, t, C), or (K, 1, C) where all samples have the same.

    Returns:
        For each parameter of P elements a tensor of shape (t, K, P).

    Raises:
        OutOfMemoryError: the device is out of memory. Any other failure of vmap falls back to a loop over samples.

    Cost: one forward and K backwards over t samples; the memory of the result, plus activations.
    """
    group = {name: module.parameters[name] for name in names}
    try:
        return _rows_by_vmap(module, group, inputs, cotangents)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):
        # vmap does not support some operators that autograd does (packed sequences, data-dependent control flow).
        return _rows_by_loop(module, group, inputs, cotangents)


def _rows_by_vmap(
    module: StatelessModule, group: dict[str, Tensor], inputs: Inputs, cotangents: Tensor
) -> dict[str, Tensor]:
    shared = cotangents.shape[1] == 1

    def rows(sample: Inputs, own: Tensor) -> dict[str, Tensor]:
        def outputs(parameters: Mapping[str, Tensor]) -> Tensor:
            return module.outputs(parameters, map_inputs(lambda tensor: tensor[None], sample))[0]

        pullback = vjp(outputs, group)[1]
        gradients = vmap(pullback)(own)[0]
        return {name: gradients[name].reshape(len(cotangents), -1) for name in group}

    given = cotangents[:, 0] if shared else cotangents
    found: dict[str, Tensor] = vmap(rows, in_dims=(0, None if shared else 1))(inputs, given)
    return {name: value.detach() for name, value in found.items()}


def _rows_by_loop(
    module: StatelessModule, group: dict[str, Tensor], inputs: Inputs, cotangents: Tensor
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in group.items()}
    count = sample_count(inputs)
    rows = {name: tensor.new_zeros(count, len(cotangents), tensor.numel()) for name, tensor in group.items()}
    every = cotangents.expand(-1, count, -1)
    for i in range(count):
        outputs = module.outputs(leaves, take(inputs, slice(i, i + 1)))[0]
        # Some samples may reach none of the parameters.
        for k, cotangent in enumerate(every[:, i] if outputs.requires_grad else ()):
            found = torch.autograd.grad(
                outputs, list(leaves.values()), cotangent, retain_graph=k + 1 < len(cotangents), allow_unused=True
            )
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    rows[name][i, k] = gradient.flatten()
    return rows
