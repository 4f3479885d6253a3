"""The rounding of the Jacobian of a sharded module, which has no copy in another precision: by noise of the size of rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_conv.kernels.reading.jacobian_error import SAFETY
from lightning_conv.kernels.reading.recording import LayerCall, layer_gradients, record
from lightning_conv.kernels.reading.sites import (
    Site,
    prepare,
    site_gradients,
    site_inputs,
    site_rows,
    tied_uses,
    token_gradients,
)
from lightning_conv.kernels.sharded.module import ShardedModule, ShardedRecorder
from lightning_conv.linalg.rounding import unit_roundoff
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.sharded import is_divided

_Pass: TypeAlias = tuple[Sequence[LayerCall], Sequence[Tensor]]
"""The calls of a forward, and B of each."""


class Shaken(ShardedRecorder):
    r"""A recorder in which each layer's inputs, outputs and output gradients are off by about their rounding.

    .. math:: x \mapsto x (1 + u g)

    with the unit roundoff u and independent standard normal g. Noise in the inputs reaches the sums of a layer as the rounding of
    their terms does, in size: :math:`u (\sum_j w_j^2 x_j^2)^{1/2}`, however much of the sum cancels.

    Args:
        module: the network.
        tracked: see ``ShardedRecorder``.
    """

    def __init__(self, module: ShardedModule, tracked: Mapping[str, Tensor]) -> None:
        super().__init__(module, tracked)
        self._unit = unit_roundoff(module.dtype)
        self._generator = torch.Generator().manual_seed(1)

    def _noisy(self, values: Tensor) -> Tensor:
        if is_divided(values):  # each process has a part, with noise of its own, as rounding has
            return values * (1 + self._unit * torch.randn_like(values))
        noise = torch.randn(values.shape, generator=self._generator, dtype=torch.float32).to(values)
        return values * (1 + self._unit * noise)

    def _record(self, func: Any, rule: Any, arguments: dict[str, Any], names: dict[str, str]) -> Tensor:
        given = arguments.get("input")
        if "input" not in names and isinstance(given, Tensor) and given.is_floating_point():
            arguments = {**arguments, "input": self._noisy(given)}
        output = super()._record(func, rule, arguments, names)
        if not output.requires_grad:
            return output
        output.register_hook(self._noisy)  # type: ignore[no-untyped-call]
        return self._noisy(output)


def passed(
    module: ShardedModule, names: Sequence[str], inputs: Inputs, cotangent: Tensor, *, shaken: bool
) -> tuple[list[LayerCall], list[Tensor]]:
    """Return the calls of one forward, and B of each for one combination of the outputs, as they are or with noise.

    Args:
        module: the network.
        names: parameters whose uses are recorded.
        inputs: samples.
        cotangent: the combination of the outputs of each, (n, C).
        shaken: whether there is noise.
    """
    tracked = {name: module.parameters[name] for name in names}
    if shaken:
        with Shaken(module, tracked) as recorder:
            outputs = module.outputs({}, inputs)
        calls = recorder.calls
    else:
        outputs, plain = record(module, inputs, tracked)
        calls = plain.calls
    found = layer_gradients(outputs, cotangent, calls, keep=False)
    return calls, [outputs.new_zeros(call.shape) if b is None else b for call, b in zip(calls, found, strict=True)]


def rounding_of(
    module: ShardedModule, names: Sequence[str], sites: Sequence[Site], inputs: Inputs, cotangent: Tensor, samples: int
) -> float:
    r"""Estimate :math:`|dG|_F / |G|_F`, the relative rounding of the gradients of one combination of the outputs, times a factor of 4.

    They are computed once as they are and once with noise of the size of rounding (``Shaken``); the result is an estimate, not a bound.

    Args:
        module: the network, inside ``undisturbed`` and ``as_found``.
        names: parameters whose uses are recorded.
        sites: the layers that are compared.
        inputs: n samples.
        cotangent: the combination of the outputs of each sample, (n, C).
        samples: n.

    Returns:
        The estimate.

    Cost: two forward and two backward passes of the samples; the gradients of the layers are compared by their factors.
    """
    calls, gradients = passed(module, names, inputs, cotangent, shaken=False)
    others, moved = passed(module, names, inputs, cotangent, shaken=True)
    parts = [part for site in sites for part in (tied_uses(site, calls) or (site,))]
    squares = [_squares(part, (calls, gradients), (others, moved), samples) for part in parts]
    size, change = sum(each for each, _ in squares), sum(each for _, each in squares)
    unit = unit_roundoff(module.dtype)
    if size == 0:
        return SAFETY * 16 * unit
    return SAFETY * max(math.sqrt(change / size), unit)


def _squares(site: Site, plain: _Pass, shaken: _Pass, samples: int) -> tuple[float, float]:
    """Return the squared norms of the gradients by the parameters of a site, and of their change by the noise."""
    (calls, gradients), (others, moved) = plain, shaken
    if site.tokens:
        words = site_inputs(site, calls, samples)
        same = ((words[:, :, None] == words[:, None]) & (words >= 0)[:, None]).double()
        b = token_gradients(site, calls, gradients, samples).double()
        off = b - token_gradients(site, others, moved, samples)
        size, change = (float((same * (each @ each.transpose(1, 2))).sum()) for each in (b, off))
        return size, change
    if site.positions:
        a, b = (site_inputs(site, calls, samples), site_gradients(site, calls, gradients, samples))
        c, d = (site_inputs(site, others, samples), site_gradients(site, others, moved, samples))
        left, right = a.double() - c, b.double() - d
        # b a^T - d c^T = (b - d) a^T + d (a - c)^T, without the cancellation of whole gradients
        moves = _product(a, right, a, right) + _product(left, d, left, d) + 2 * _product(a, right, left, d)
        return _product(a, b, a, b), max(moves, 0.0)
    size = change = 0.0
    for name in site.names:
        rows = site_rows(prepare(site, calls, samples), name, gradients, samples).double()
        noisy = site_rows(prepare(site, others, samples), name, moved, samples)
        size += float(rows.square().sum())
        change += float((rows - noisy).square().sum())
    return size, change


def _product(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
    r"""Return :math:`\sum_i \langle \sum_r b_{ir} a_{ir}^T, \sum_s d_{is} c_{is}^T \rangle` for factors (n, R, groups, width)."""
    first, second = (torch.einsum("irgk,isgk->igrs", x.double(), y.double()) for x, y in ((a, c), (b, d)))
    product: Tensor = first * second
    return float(product.sum())
