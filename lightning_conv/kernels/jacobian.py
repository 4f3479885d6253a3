"""Per-sample Jacobians by ``torch.func`` for the parameters that no layer rule covers, a parameter group at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from lightning_conv.evaluation import Inputs, StatelessModule, map_inputs, sample_count
from lightning_conv.kernels.precision import Precision, product, product_gamma


@dataclass
class JacobianFactor:
    """Rows of the Jacobian of one parameter group for one tile of samples."""

    rows: Tensor  # J: (t, K, P)

    def gram(
        self, other: JacobianFactor, *, trace: bool, precision: Precision, block_bytes: int
    ) -> tuple[Tensor, float]:
        """J J'^T of two tiles and its gamma: (t, s) summed over the K outputs, or (t K, s K)."""
        del block_bytes
        x, y = (f.rows.flatten(1) if trace else f.rows.flatten(0, 1) for f in (self, other))
        return product(x, y, precision), product_gamma(x.shape[1], x.dtype, precision)


def jacobian_rows(module: StatelessModule, names: tuple[str, ...], inputs: Inputs, cotangents: Tensor) -> Tensor:
    """Rows c^T du_i/d(names) for every sample i and every cotangent c.

    Args:
        module: the network as a function.
        names: parameters, P elements together.
        inputs: t samples.
        cotangents: (K, C), one row for each combination of outputs.

    Returns:
        Tensor of shape (t, K, P). Cost: one forward and K backwards over t samples; memory t K P elements, plus
        activations.

    Raises:
        OutOfMemoryError: of the device; any other failure of vmap falls back to a loop over samples.
    """
    group = {name: module.parameters[name] for name in names}
    try:
        return _rows_by_vmap(module, group, inputs, cotangents)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):
        # vmap has no rule for some operators (recurrent layers, data-dependent control flow); autograd has.
        return _rows_by_loop(module, group, inputs, cotangents)


def _rows_by_vmap(module: StatelessModule, group: dict[str, Tensor], inputs: Inputs, cotangents: Tensor) -> Tensor:
    def rows(sample: Inputs) -> Tensor:
        def outputs(parameters: Mapping[str, Tensor]) -> Tensor:
            return module.outputs(parameters, map_inputs(lambda tensor: tensor[None], sample))[0]

        pullback = vjp(outputs, group)[1]
        gradients = vmap(pullback)(cotangents)[0]
        return torch.cat([gradients[name].flatten(1) for name in group], 1)

    result: Tensor = vmap(rows)(inputs)
    return result.detach()


def _rows_by_loop(module: StatelessModule, group: dict[str, Tensor], inputs: Inputs, cotangents: Tensor) -> Tensor:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in group.items()}
    samples: list[Tensor] = []
    for i in range(sample_count(inputs)):
        outputs = module.outputs(leaves, map_inputs(lambda tensor, i=i: tensor[i : i + 1], inputs))[0]  # type: ignore[misc]
        lines: list[Tensor] = []
        for cotangent in cotangents:
            found = torch.autograd.grad(
                outputs @ cotangent, list(leaves.values()), retain_graph=True, allow_unused=True
            )
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(group.values(), found, strict=True)]
            lines.append(torch.cat([part.flatten() for part in parts]))
        samples.append(torch.stack(lines))
    return torch.stack(samples)
