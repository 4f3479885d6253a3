"""The rounding error in the Jacobian of a network, measured against the same network in the other precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_conv.kernels.reading.recording import LayerCall, edges_of, record, signature_of
from lightning_conv.kernels.reading.sites import Site, site_gradients, site_inputs
from lightning_conv.linalg.rounding import unit_roundoff
from lightning_conv.networks.aside import aside
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.narrow_watch import NarrowWatch, narrowing_of
from lightning_conv.networks.narrowing import Narrowing
from lightning_conv.networks.origins import TypeRefusal, type_refusal
from lightning_conv.networks.widened import Widened

SAFETY = 4.0
"""Factor on the measured error."""
AT_ONCE = 2**16
"""Numbers of two gradients that are compared at once, so that what is between stays in the cache."""


@dataclass(frozen=True)
class Factored:
    """What ``estimate_jacobian_error`` needs for comparing linear layers by their factors."""

    sites: Sequence[Site]
    calls: Sequence[LayerCall]  # calls of a forward on the samples
    gradients: Sequence[Tensor]  # B of each call, for the mixture of outputs


def parameter_gradients(
    module: StatelessModule,
    names: Sequence[str],
    inputs: Inputs,
    mixture: Tensor,
    moved: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor | None]:
    """Return the gradients of sum(mixture * outputs) by the named parameters from autograd.

    The gradient is None for a parameter that does not enter. With ``moved`` these take the place of the network's own parameters.
    """
    moved = moved or {}
    leaves = {name: moved.get(name, module.parameters[name]).detach().requires_grad_() for name in names}
    outputs = module.outputs({**moved, **leaves}, inputs)
    if not outputs.requires_grad:
        return dict.fromkeys(names)
    found = torch.autograd.grad((outputs * mixture.to(outputs)).sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(names, found, strict=True))


def estimate_jacobian_error(
    module: StatelessModule,
    inputs: Inputs,
    mixture: Tensor,
    truth: Mapping[str, Tensor | None],
    *,
    by_factors: Factored | None,
    refusal: TypeRefusal | None = None,
) -> tuple[float, Narrowing | None]:
    """Estimate the relative rounding error |dJ|_F / |J|_F of the Jacobian in the module's dtype, times a factor of 4.

    The same random combination of Jacobian rows is computed in float32 and in float64. For a float64 evaluation the
    float32 error is scaled by 2^-29, the ratio of the unit roundoffs. The result is an estimate, not a bound. A twin in
    float64 is watched for casts to a narrower type: with one it is no more exact than the network (``with_narrowing``). A network that
    has no path in float64, since it makes float32 itself, is compared with what it computes where those types are widened.

    Linear layers with one position are compared by their factors, |d(b a^T)| <= |db||a| + |b||da|, so that gradients as
    large as the network need not be formed. The other parameters are compared by the gradients of autograd, one after
    the other. Frozen statistics are taken as they are, since rounding averages out in them.

    Args:
        module: the network.
        inputs: a few samples.
        mixture: random combination of their outputs, with independent standard normal entries.
        truth: the gradients of sum(mixture * outputs) from autograd.
        by_factors: the layers to compare by their factors; None: compare every parameter by its gradient.
        refusal: why the forward cannot be evaluated in float64; the float64 function is then that of ``Widened``.

    Returns:
        The estimate, and the place at which a twin in float64 casts; None: nowhere, or the twin is in float32.
    """
    difference, narrowing = difference_of_passes(module, inputs, mixture, truth, by_factors=by_factors, refusal=refusal)
    unit = unit_roundoff(module.dtype)
    if difference is None:
        return with_narrowing(SAFETY * 16 * unit, module.dtype, narrowing), narrowing
    error = SAFETY * max(difference.relative * ratio_to_twin(module.dtype), unit)
    return with_narrowing(error, module.dtype, narrowing), narrowing


def error_again(
    module: StatelessModule,
    inputs: Inputs,
    mixture: Tensor,
    truth: Mapping[str, Tensor | None],
    narrowing: Narrowing | None,
) -> float:
    """Return ``estimate_jacobian_error`` at other weights, for a network whose casts are known.

    Args:
        module: the network.
        inputs: see ``estimate_jacobian_error``.
        mixture: see ``estimate_jacobian_error``.
        truth: see ``estimate_jacobian_error``.
        narrowing: where it casts to a narrower type; None: nowhere.
    """
    difference, refused = difference_of_passes(module, inputs, mixture, truth, by_factors=None, watched=False)
    unit = unit_roundoff(module.dtype)
    relative = 16 * unit if difference is None else max(difference.relative * ratio_to_twin(module.dtype), unit)
    return with_narrowing(SAFETY * relative, module.dtype, narrowing or refused)


def ratio_to_twin(dtype: torch.dtype) -> float:
    """Return the factor from a difference to the twin in the other precision to the rounding of an evaluation in ``dtype``."""
    return 2.0**-29 if dtype == torch.float64 else 1.0


def difference_of_passes(
    module: StatelessModule,
    inputs: Inputs,
    mixture: Tensor,
    truth: Mapping[str, Tensor | None],
    *,
    by_factors: Factored | None,
    refusal: TypeRefusal | None = None,
    watched: bool = True,
) -> tuple[Difference | None, Narrowing | None]:
    """Compare the gradients ``truth`` with those of a twin of the network in the other precision.

    Args and the second result are those of ``estimate_jacobian_error``; without ``watched`` a twin in float64 is not watched for casts.

    Returns:
        The difference, and the place of a cast. The difference is None where the forward works in one precision only.
    """
    other = torch.float32 if module.dtype == torch.float64 else torch.float64
    sites = [] if by_factors is None else [s for s in by_factors.sites if s.linear and s.positions == 1]
    covered = {name for site in sites for name in site.names}
    rest = {name: gradient for name, gradient in truth.items() if name not in covered and gradient is not None}
    difference = Difference()
    twin = module.twin(other)
    leaves = {name: twin.parameters[name].detach().requires_grad_() for name in rest}
    twin.parameters |= leaves
    wanted = sorted({use.call for site in sites for use in site.uses})
    few = twin.convert(inputs)
    watching = watched and other == torch.float64 and refusal is None
    mixture = mixture.to(next(iter(twin.parameters.values())))
    # What the comparison itself brings in is no number from outside: the mixture is given, and the hooks are not watched.
    watch = NarrowWatch(twin, few, mixture, parameters=leaves) if watching else None
    mode = nullcontext() if watch is None else watch.watching()
    try:
        with mode if refusal is None else Widened():  # type: ignore[no-untyped-call]
            # Without layers to compare nothing is recorded, since a forward that uses torch.func inside cannot be.
            outputs, recorder = record(twin, few, {n: twin.parameters[n] for n in truth if sites})
            calls = recorder.calls
            if by_factors is not None and sites and signature_of(calls) != signature_of(by_factors.calls):
                return None, None
            for name, leaf in leaves.items():
                leaf.register_hook(partial(difference.add, rest[name]))  # type: ignore[no-untyped-call]
            found = torch.autograd.grad(
                outputs,
                [*edges_of([calls[index] for index in wanted]), *leaves.values()],  # type: ignore[arg-type]
                mixture.to(outputs),
                allow_unused=True,
            )
        narrowing = None if watch is None else narrowing_of(twin, few, watch)
    except (TypeError, RuntimeError):  # a forward that works in one dtype only
        if refusal is None and other == torch.float64:
            refusal = type_refusal(module.again, inputs, other)
            if refusal is not None:
                return difference_of_passes(module, inputs, mixture, truth, by_factors=by_factors, refusal=refusal)
        return None, None if refusal is None else refusal.narrowing
    narrowing = narrowing if refusal is None else refusal.narrowing
    theirs = dict(zip(wanted, found, strict=False))
    for site in sites:
        assert by_factors is not None
        index, samples = site.uses[0].call, len(mixture)
        twin_gradient = theirs[index]
        if twin_gradient is not None:
            difference.add_factors(
                _factors(site, by_factors.calls, by_factors.gradients[index], samples),
                _factors(site, calls, twin_gradient, samples),
                bias=site.bias is not None,
            )
    return difference, narrowing


def with_narrowing(error: float, dtype: torch.dtype, narrowing: Narrowing | None) -> float:
    """Return the estimate of ``estimate_jacobian_error`` for a network that casts to a narrower type of unit roundoff u.

    It is the largest of the estimate, the estimate scaled from the evaluation's own unit roundoff to u, and 64 u, the value where two
    evaluations cannot be compared: both cast alike, so their difference does not measure the cast.

    Args:
        error: the estimate.
        dtype: type of the evaluation.
        narrowing: what a ``NarrowWatch`` saw; None: no cast.
    """
    if narrowing is None:
        return error
    return max(error, error * narrowing.unit / unit_roundoff(dtype), SAFETY * 16 * narrowing.unit)


class Difference:
    """Accumulates |dJ|_F and |J|_F over the parameters."""

    def __init__(self) -> None:
        self._change = self._size = 0.0

    @property
    def relative(self) -> float:
        """Relative error |dJ|_F / |J|_F so far."""
        return (self._change / self._size) ** 0.5 if self._size else 0.0

    @property
    def change(self) -> float:
        """Absolute error |dJ|_F so far."""
        return math.sqrt(self._change)

    def add(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """Add the two gradients of one parameter.

        As a hook on the leaf of the second it returns zeros that take no memory.
        """
        with aside(transforms=False):
            one, other = (each.detach().flatten() for each in (mine, theirs))
            for start in range(0, len(one), AT_ONCE):
                wide = other[start : start + AT_ONCE].double()
                self._size += float(wide @ wide)
                moved = wide - one[start : start + AT_ONCE]
                self._change += float(moved @ moved)
            return theirs.new_zeros(()).expand_as(theirs)

    def add_factors(
        self, mine: Sequence[tuple[Tensor, Tensor]], theirs: Sequence[tuple[Tensor, Tensor]], *, bias: bool
    ) -> None:
        """Add a bound for the gradients b a^T of a linear layer, and b of its bias, from all pairs (a, b)."""
        for (a, b), (c, d) in zip(mine, theirs, strict=True):
            moved = (b - d).norm() * a.norm() + d.norm() * (a - c).norm()
            self._change += float(moved**2 + bias * (b - d).norm() ** 2)
            self._size += float(d.norm() ** 2 * (c.norm() ** 2 + bias))


def _factors(site: Site, calls: Sequence[LayerCall], gradient: Tensor, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs (a, b) of all samples in float64."""
    call = site.uses[0].call
    inputs = site_inputs(site, calls, samples).flatten(1).double()
    outer = site_gradients(site, calls, {call: gradient}, samples).flatten(1).double()
    return list(zip(inputs, outer, strict=True))
