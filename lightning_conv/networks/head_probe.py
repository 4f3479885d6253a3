"""``probe_head``: what a layer computes at random weights, compared with W h + b."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.linalg.rounding import gamma, unit_roundoff
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.watched import as_rows, entering, watched_forward

SCALES = (1.0, -1.0, 1e3, -1e3)
"""Sizes of the random weights, in units of the layer's own; both signs, since a ReLU does not show on positive outputs."""


@dataclass(frozen=True)
class HeadProbe:
    """What a layer was seen to compute at its own weights and at random ones."""

    departs: str  # why its output is not W h + b; empty if it is, at all settings
    last: bool  # whether its output is the model's, at all settings


def probe_head(model: nn.Module, layer: nn.Linear, inputs: Inputs) -> HeadProbe:
    r"""Compare the output of a layer with W h + b, at its own W and b and at four random settings of them.

    The class of a layer does not tell what it computes: a subclass, a hook, a mask or a clamp may change it. The input h is that which
    enters the layer in a forward of the whole model in eval mode; it must be the same at every setting. The product is computed apart
    from the layer, in float64, and the two may differ by rounding alone: four times :math:`\gamma_{m + 2} (|W| |h| + |b|)`, entry by
    entry, at most 6 % of it. Entries that are not finite, or that overflow the type, are not compared. Every forward gets weights of its
    own, so that one that overwrites them is seen. With gradients recorded, at the layer's own weights and at random ones, the output must
    be the same, and its gradients those of W h + b: :math:`\sum_i c_i h_i^\top` and :math:`\sum_i c_i` for random :math:`c_i`.

    Args:
        model: the network, in which nothing is changed.
        layer: a linear layer of it that a forward calls once, on a matrix.
        inputs: a few samples.

    Cost: seven forwards of ``inputs``.
    """
    further = sorted(name for name, _ in layer.named_parameters() if name not in ("weight", "bias"))
    if further:
        return HeadProbe(f"has parameters beside weight and bias ({', '.join(further)})", last=False)
    module, first, last = StatelessModule(model), None, True
    names = [next(name for name, other in model.named_parameters() if other is own) for own in layer.parameters()]
    own = [module.parameters[name] for name in names]
    for values in _settings(own):
        seen: list[tuple[Tensor, Tensor]] = []

        def look(
            _: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            output: Tensor,
            seen: list[tuple[Tensor, Tensor]] = seen,
        ) -> None:
            # A copy: a later layer may work in place.
            seen.append((as_rows(entering(args, kwargs)), as_rows(output.detach().clone())))

        hook = layer.register_forward_hook(look, with_kwargs=True)
        given = [each.detach().clone() for each in values]
        result = watched_forward(module, inputs, [hook], parameters=dict(zip(names, given, strict=True)))
        features, output = seen[0]
        first = features if first is None else first
        if len(seen) != 1 or not same(features, first):
            return HeadProbe("is given an input that depends on its own weights, or on earlier calls", last=False)
        if said := departure(output, features, *values):
            where = "its own" if values is own else "random"
            return HeadProbe(f"is a {type(layer).__name__} whose {said} at {where} weights", last=False)
        last = last and same(output, result)
    for values in list(_settings(own))[:2]:
        with torch.inference_mode(False), torch.enable_grad():
            said = _with_gradients(module, layer, inputs, dict(zip(names, values, strict=True)))
        if said:
            return HeadProbe(f"is a {type(layer).__name__} whose {said}", last=False)
    return HeadProbe("", last)


def _with_gradients(module: StatelessModule, layer: nn.Linear, inputs: Inputs, values: dict[str, Tensor]) -> str:
    """Return how output or gradients differ from those of W h + b where gradients are recorded; empty if they do not."""
    weights = {name: each.detach().clone().requires_grad_() for name, each in values.items()}
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        seen.append((as_rows(entering(args, kwargs)), as_rows(output.clone())))

    hook = layer.register_forward_hook(look, with_kwargs=True)
    watched_forward(module, inputs, [hook], parameters=weights, within=torch.enable_grad())
    if len(seen) != 1:
        return f"forward is called {len(seen)} times where gradients are recorded"
    h, output = seen[0]
    if said := departure(output.detach(), h, *(each.detach() for each in values.values())):
        return f"{said} where gradients are recorded"
    c = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(output)
    if not output.requires_grad:
        return "output has no gradient by its weights"
    made = torch.autograd.grad(output, list(weights.values()), c, allow_unused=True)
    wide, entered = c.double(), h.double()
    expected = [wide.T @ entered, wide.sum(0)]
    sizes = [wide.abs().T @ entered.abs(), wide.abs().sum(0)]
    for found, true, size in zip(made, expected, sizes, strict=False):
        if not bool(torch.isfinite(true).all()):
            continue
        apart = (true if found is None else found.double() - true).abs()
        relative = min(4 * gamma(len(h) + 2, output.dtype), 16 * unit_roundoff(torch.bfloat16))
        underflow = len(h) * torch.finfo(output.dtype).tiny
        if bool((apart > relative * size + underflow).any()):
            return "gradient by its weights is not that of W h + b"
    return ""


def _settings(own: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the layer's own [W, b], then random ones of the same shapes and types."""
    yield own
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in own]
    size = float(own[0].double().square().mean().sqrt())
    size = size if 0 < size < float("inf") else own[0].shape[1] ** -0.5
    for scale in SCALES:
        yield [(scale * size * each).to(like) for each, like in zip(drawn, own, strict=True)]


def departure(output: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    r"""Return how an output differs from W h + b by more than rounding, as words; empty if it does not.

    Rounding: four times :math:`\gamma_{m + 2} (|W| |h| + |b|)` in the type of the output, entry by entry.

    Args:
        output: What the layer returned, (n, C).
        features: h, what entered it, (n, m).
        weight: W, (C, m).
        bias: b, (C,); None: there is none.
    """
    h, w = features.double(), weight.detach().double()
    b = torch.zeros(len(w), dtype=torch.float64, device=w.device) if bias is None else bias.detach().double()
    expected, sizes = h @ w.T + b, h.abs() @ w.abs().T + b.abs()
    if output.shape != expected.shape:
        return f"output of shape {tuple(output.shape)} is not W h + b, of shape {tuple(expected.shape)}"
    dtype = output.dtype
    allowed = min(4 * gamma(w.shape[1] + 2, dtype), 16 * unit_roundoff(torch.bfloat16))
    limits = torch.finfo(dtype)
    compared = torch.isfinite(expected) & (sizes < limits.max / 2)
    apart = (output.double() - expected).abs() / sizes.clamp(min=limits.tiny)
    apart = torch.where(compared, torch.nan_to_num(apart, nan=float("inf")), 0.0)
    largest = float(apart.max()) if apart.numel() else 0.0
    if largest <= allowed:
        return ""
    return f"output is not W h + b (it differs by {largest:.2g} of |W| |h| + |b|)"


def same(output: Tensor, result: object) -> bool:
    """Return whether two results hold the same numbers bit for bit; NaN counts as equal, since a diverged network has a head too.

    Args:
        output: a tensor.
        result: what it is compared with.
    """
    if not isinstance(result, Tensor) or output.numel() != result.numel() or output.dtype != result.dtype:
        return False
    return torch.allclose(output.flatten(), result.detach().flatten(), rtol=0, atol=0, equal_nan=True)
