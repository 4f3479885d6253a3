"""Gram blocks of linear layers from layer inputs A and output gradients B: the n x P Jacobian is never formed.

A linear layer z = W a + b (nn.Linear or F.linear) seen by sample i at positions r (sequence steps, or repeated calls)
has the per-sample derivatives   du_ic/dW = sum_r b_icr a_ir^T,   du_ic/db = sum_r b_icr,   b_icr = du_ic/dz_ir, so that
with one position

    G_W[(i,c),(j,d)] = (b_ic . b_jd) (a_i . a_j),      G_b[(i,c),(j,d)] = b_ic . b_jd                (Hadamard rule)

and with several positions the per-sample matrices are formed block by block of output rows and multiplied out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_conv.kernels.precision import Precision, product, product_gamma
from lightning_conv.kernels.precision import gamma as gamma_k


@dataclass
class LinearCall:
    """One call of a linear layer: who was called, with what, and the zero added to its output (whose gradient is B)."""

    weight: str | None
    bias: str | None
    inputs: Tensor  # (n, ..., in)
    probe: Tensor  # (n, ..., out), zeros


class LinearCalls(TorchFunctionMode):
    """Records every ``F.linear`` that uses a tracked parameter, and every other function that touches one.

    A parameter in ``elsewhere`` has uses that the Hadamard rule does not see (a transposed decoder, attention's
    in-projection, a parametrization): it belongs to the general engine.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self.calls: list[LinearCall] = []
        self.elsewhere: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.linear:
            values = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            return self._linear(values["input"], values["weight"], values.get("bias"))
        result = func(*args, **kwargs)
        if _holds_tensor(result):
            self._mark(args)
            self._mark(kwargs.values())
        return result

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(inputs, weight, bias)
        names = self._names.get(id(weight)), None if bias is None else self._names.get(id(bias))
        self._mark([inputs])
        if names == (None, None):
            return out
        # An expanded scalar: the gradient with respect to it is B, at no memory of its own. Its sum is a tensor of its
        # own, so an in-place activation after the layer cannot reach into what was recorded.
        probe = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape).requires_grad_()
        self.calls.append(LinearCall(*names, inputs.detach(), probe))
        return out + probe

    def _mark(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                name = self._names.get(id(value))
                if name is not None:
                    self.elsewhere.add(name)
            elif isinstance(value, (list, tuple)):
                self._mark(value)
            elif isinstance(value, Mapping):
                self._mark(value.values())


def _holds_tensor(result: object) -> bool:
    if isinstance(result, Tensor):
        return True
    return isinstance(result, (list, tuple)) and any(_holds_tensor(value) for value in result)


@dataclass(frozen=True)
class LinearSite:
    """Which calls of the recorded sequence belong to one weight, and what of it counts."""

    calls: tuple[int, ...]
    weight: str | None
    bias: str | None


def linear_sites(calls: Sequence[LinearCall], allowed: set[str]) -> list[LinearSite]:
    """Group calls by parameter: a shared parameter is one site of several calls (its derivatives add before the product)."""
    weights: dict[str, list[int]] = {}
    biases: dict[str, list[int]] = {}
    for index, call in enumerate(calls):
        if call.weight in allowed:
            weights.setdefault(call.weight, []).append(index)
        if call.bias in allowed:
            biases.setdefault(call.bias, []).append(index)
    sites = []
    for weight, indices in weights.items():
        # Weight and bias of the usual layer are called together and share one product of B.
        bias = next((name for name, others in biases.items() if others == indices), None)
        if bias is not None:
            del biases[bias]
        sites.append(LinearSite(tuple(indices), weight, bias))
    return sites + [LinearSite(tuple(indices), None, name) for name, indices in biases.items()]


@dataclass
class LinearFactor:
    """A and B of one site for one tile of samples."""

    inputs: Tensor  # A: (t, R, in)
    gradients: Tensor  # B: (t, K, R, out), K outputs (or 1 for a summed output)
    weight: bool
    bias: bool

    def _bias_rows(self, precision: Precision) -> Tensor:
        """(t, K, out): the gradients summed over positions."""
        if self.gradients.shape[2] == 1:
            return self.gradients[:, :, 0]
        return self.gradients.sum(2, dtype=None if precision == "fast" else torch.float64)

    def gram(self, other: LinearFactor, *, trace: bool, precision: Precision, block_bytes: int) -> tuple[Tensor, float]:
        """The Gram block of two tiles and its gamma (see ``product_gamma``): (t, s) summed over outputs, or (t K, s K)."""
        positions, outputs = self.gradients.shape[2], self.gradients.shape[1]
        gamma = 0.0
        block: Tensor | None = None
        if self.weight and positions > 1:
            block, gamma = self._sequence_gram(other, trace=trace, precision=precision, block_bytes=block_bytes)
        if self.bias or positions == 1:
            rows = _as_rows(self._bias_rows(precision), trace), _as_rows(other._bias_rows(precision), trace)
            pair = product(*rows, precision)
            gamma = max(gamma, product_gamma(rows[0].shape[1], rows[0].dtype, precision))
            if self.weight and positions == 1:
                overlap = product(self.inputs[:, 0], other.inputs[:, 0], precision)
                gamma_a = product_gamma(self.inputs.shape[2], self.inputs.dtype, precision)
                gamma = gamma + gamma_a + gamma * gamma_a
                if self.bias:
                    overlap += 1
                if not trace:
                    overlap = overlap.repeat_interleave(outputs, 0).repeat_interleave(outputs, 1)
                pair *= overlap
            block = pair if block is None else block.add_(pair)
        assert block is not None
        return block, gamma

    def _sequence_gram(
        self, other: LinearFactor, *, trace: bool, precision: Precision, block_bytes: int
    ) -> tuple[Tensor, float]:
        """Sum over blocks of output rows o of the products of per-sample gradients sum_r b_icro a_ir."""
        tile, outputs, _, out = self.gradients.shape
        size = 8 * outputs * self.inputs.shape[2] * (tile + other.gradients.shape[0])
        step = max(1, min(out, block_bytes // max(size, 1)))
        total: Tensor | None = None
        gamma = 0.0
        for start in range(0, out, step):
            rows = [_as_rows(f._per_sample(start, start + step, precision), trace) for f in (self, other)]
            part = product(rows[0], rows[1], precision)
            gamma = max(gamma, product_gamma(rows[0].shape[1], rows[0].dtype, precision))
            total = part if total is None else total.add_(part)
        assert total is not None
        # The blocks are added up in float64: one rounding each.
        return total, gamma + (1 + gamma) * gamma_k(-(-out // step), torch.float64)

    def _per_sample(self, start: int, stop: int, precision: Precision) -> Tensor:
        gradients, inputs = self.gradients[..., start:stop], self.inputs
        if precision != "fast":
            gradients, inputs = gradients.double(), inputs.double()
        return torch.einsum("tkro,tri->tkoi", gradients, inputs).flatten(2)


def _as_rows(values: Tensor, trace: bool) -> Tensor:
    """(t, K, p) as rows of a product: (t, K p) sums over the outputs, (t K, p) keeps them apart."""
    return values.flatten(1) if trace else values.flatten(0, 1)


def linear_factors(
    calls: Sequence[LinearCall], gradients: Sequence[Tensor], sites: Sequence[LinearSite]
) -> list[LinearFactor]:
    """Factors of all sites of one tile. ``gradients[k]``: B of call k, shape (t, K, ..., out)."""
    factors = []
    for site in sites:
        inputs = [
            calls[k].inputs.flatten(1, -2) if calls[k].inputs.ndim > 2 else calls[k].inputs[:, None] for k in site.calls
        ]
        outer = [gradients[k].flatten(2, -2) if gradients[k].ndim > 3 else gradients[k][:, :, None] for k in site.calls]
        factors.append(
            LinearFactor(torch.cat(inputs, 1), torch.cat(outer, 2), site.weight is not None, site.bias is not None)
        )
    return factors
