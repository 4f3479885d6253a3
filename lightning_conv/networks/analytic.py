"""Real-analytic networks: find the functions of a network that are not real-analytic, and replace them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.checked import checked, real
from lightning_conv.networks.analytic_layers import judge_layer
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.operators import same_from
from lightning_conv.networks.watched import watched_forward
from lightning_conv.networks.weight_trace import Step, WeightTrace

SAMPLES = 4
"""Number of samples of a trace."""


@dataclass(frozen=True)
class Kink:
    """A function that is not real-analytic, or not known to be, and the module that calls it."""

    module: str  # dotted name, "" for the network itself
    what: str
    known: bool = True
    """Whether it is known to have a kink or a jump; False: it is only not known to be real-analytic."""

    def __str__(self) -> str:
        """Return the text for messages."""
        return f"{self.what} in {self.module or 'the forward of the network itself'}"


def find_kinks(model: nn.Module, inputs: Inputs, *, enough: int | None = None) -> list[Kink]:
    """List what a forward in eval mode calls that is not known to be real-analytic in the weights, once per module.

    An empty list says: on these samples the outputs are a composition of operators on a list of real-analytic ones
    (``operators``), as functions of all weights. So Kawaguchi & Sun 2021 assume. Affine layers, normalisations with
    eps > 0, softmax, attention, recurrent layers and smooth activations (softplus, tanh, sigmoid, GELU, SiLU, Mish) are on the
    list; a root, a logarithm or a quotient is so where its argument is positive at every weight (a variance plus eps, an exp, a
    square plus one: ``signs``). Functions of the inputs alone are constant in the weights and are not listed. Everything
    else is: known kinks and jumps by their usual names, random numbers, and, with ``known=False``, every operator that is
    not on the list and every value that Python reads (``item``, ``if``, ``numpy``).

    The statement is about the formulas and the samples seen. Torch's softplus, which turns linear at a threshold, counts as
    its formula where its branches round to one number, or where no sample seen is beyond the threshold.

    A second forward at other weights must call the same operators with the same constants. What it does else is listed.

    Args:
        model: any module; it is not modified.
        inputs: samples; the first four are used.
        enough: number of functions, one of them with a known kink, that make a second forward unnecessary; None: it is made anyway.

    Cost: one or two forward passes of four samples, with all their results and a copy of the weights in memory.

    Example:
        >>> import torch
        >>> [str(kink) for kink in find_kinks(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.ones(1, 2))]
        ['ReLU in 1']
    """
    few = take(inputs, slice(min(SAMPLES, sample_count(inputs))))
    found, here = _trace(StatelessModule(model), few)
    if enough is not None and len(found) >= enough and any(kink.known for kink in found):
        return list(found)
    module = StatelessModule(model)
    try:
        more, there = _trace(module, few, _other_weights(module.parameters))
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return [*found, Kink("", f"a forward that fails at other weights ({type(error).__name__})", known=False)]
    found |= more
    if here != there and all(kink.known for kink in found):
        pairs = zip_longest(here, there, fillvalue=("its end", "", ()))
        operator, place, _ = next(a for a, b in pairs if a != b)
        found[Kink(place, f"another computation at other weights, from {operator} on", known=False)] = None
    return list(found)


def _trace(
    module: StatelessModule, inputs: Inputs, parameters: Mapping[str, Tensor] | None = None
) -> tuple[dict[Kink, None], list[Step]]:
    """Run one forward and return what is not analytic, in order, and the operators that saw the weights."""
    names = {layer: name for name, layer in module.model.named_modules()}
    weights = [*module.parameters.values(), *module.model.parameters(), *(parameters or {}).values()]
    trace = WeightTrace(weights, module.dtype, present=parameters is None)

    def enter(layer: nn.Module, _: tuple[Any, ...]) -> None:
        trace.inside.append(names.get(layer, ""))

    def leave(*_: Any) -> None:
        trace.inside.pop()

    layers = [layer for layer in names if not isinstance(layer, torch.jit.ScriptModule)]  # which take no hooks
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # fused kernels are not seen
        trace.end(watched_forward(module, inputs, handles, parameters=parameters, within=trace))
    return dict.fromkeys(Kink(*each) for each in trace.found), trace.steps


def _other_weights(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights plus Gaussian numbers of their own root mean square, or of 1 where they are all zero."""
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, weight in parameters.items():
        if weight.is_floating_point() and weight.numel():
            size = float(weight.double().square().mean().sqrt()) or 1.0
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
            moved[name] = weight + size * noise
    return moved


@dataclass(frozen=True)
class Smoothed:
    """A network with smooth activations."""

    model: nn.Module
    swapped: tuple[str, ...]
    """Dotted names of the activations that were replaced."""
    left: tuple[Kink, ...]
    """What is not known to be real-analytic after the replacements, see ``find_kinks``. If it is empty, the network is
    real-analytic in its weights: on the samples given, or, without samples, by the types of its modules."""
    watched: bool = True
    """Whether a forward was run, so that ``left`` lists functions. False: modules, by their exact type."""


def softplus(beta: float) -> nn.Softplus:
    """Return the activation ln(1 + exp(beta z)) / beta, which is within ln(2) / beta of ReLU.

    Torch's softplus turns linear above a threshold, beta z = 20 by default. At 40, used here, the two branches agree to
    the last bit in float64.
    """
    return nn.Softplus(beta=beta, threshold=40.0)


class LeakySoftplus(nn.Module):
    """slope z + (1 - slope) softplus(z): the smooth twin of a leaky ReLU."""

    def __init__(self, slope: float, beta: float) -> None:
        super().__init__()
        self.slope, self.smooth = slope, softplus(beta)

    def forward(self, z: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        result: Tensor = self.slope * z + (1 - self.slope) * self.smooth(z)
        return result


class SoftplusSix(nn.Module):
    """softplus(z) - softplus(z - 6): the smooth twin of ReLU6."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.smooth = softplus(beta)

    def forward(self, z: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        result: Tensor = self.smooth(z) - self.smooth(z - 6)
        return result


_TWINS: dict[type[nn.Module], Callable[[Any, float], nn.Module]] = {
    nn.ReLU: lambda _, beta: softplus(beta),
    nn.LeakyReLU: lambda layer, beta: LeakySoftplus(layer.negative_slope, beta),
    nn.ReLU6: lambda _, beta: SoftplusSix(beta),
}


@checked(beta=real(above=0))
def make_analytic(model: nn.Module, inputs: Inputs | None = None, *, beta: float = 100.0) -> Smoothed:
    """Copy ``model``, replace ReLU, leaky ReLU and ReLU6 by softplus activations, and list the kinks that are left.

    Only modules can be replaced. A ``torch.relu`` inside a forward is listed in ``left``, and so is max pooling, which has
    no smooth counterpart that computes the same, and everything that is not known to be real-analytic.

    Args:
        model: any module; it is not modified.
        inputs: samples for a forward that detects what is left, by ``find_kinks``. None: no forward is run and ``watched``
            is False. Then ``left`` lists modules: those with kinks, and with ``known=False`` all whose exact type is not on
            the list of analytic layers (``analytic_layers``), as the class of a network of one's own is not.
        beta: sharpness; each activation changes by at most ln(2) / beta.

    Raises:
        ValueError: ``beta`` is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta: {beta}; need a positive sharpness, such as 100")
    twin = copy.deepcopy(model)
    swapped = []
    new: dict[int, nn.Module] = {}  # a module that is used in several places is replaced by one module
    for name, module in list(twin.named_modules(remove_duplicate=False)):
        make = _TWINS.get(type(module))
        if make is None or not name:
            continue
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, new.setdefault(id(module), make(module, beta).train(module.training)))
        swapped.append(name)
    if type(twin) in _TWINS:
        twin, swapped = _TWINS[type(twin)](twin, beta).train(twin.training), [""]
    if inputs is not None:
        return Smoothed(twin, tuple(swapped), tuple(find_kinks(twin, inputs)))
    wide = any(p.dtype == torch.float64 for p in twin.parameters())
    same = same_from(torch.float64 if wide else torch.float32)
    judged = {
        name: None if type(layer) in (LeakySoftplus, SoftplusSix) else judge_layer(layer, same)
        for name, layer in twin.named_modules()
    }
    left = tuple(Kink(name, *found) for name, found in judged.items() if found is not None)
    return Smoothed(twin, tuple(swapped), left, watched=False)
