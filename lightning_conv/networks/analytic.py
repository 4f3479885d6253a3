"""Real-analytic networks: what in a network is not, and how to make it so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_conv.networks.evaluation import Inputs, StatelessModule, sample_count, take
from lightning_conv.networks.watched import watched_forward

KINKED = {
    "relu": "ReLU",
    "relu_": "ReLU",
    "threshold": "threshold",
    "clamp": "clamp",
    "clamp_": "clamp",
    "clamp_min": "clamp",
    "clamp_min_": "clamp",
    "clamp_max": "clamp",
    "clamp_max_": "clamp",
    "hardtanh": "hard tanh or ReLU6",
    "hardtanh_": "hard tanh or ReLU6",
    "leaky_relu": "leaky ReLU",
    "leaky_relu_": "leaky ReLU",
    "rrelu_with_noise": "RReLU",
    "_prelu_kernel": "PReLU",
    "elu": "ELU, SELU or CELU",
    "elu_": "ELU, SELU or CELU",
    "celu": "ELU, SELU or CELU",
    "celu_": "ELU, SELU or CELU",
    "hardswish": "hard swish",
    "hardswish_": "hard swish",
    "hardsigmoid": "hard sigmoid",
    "hardshrink": "hard shrink",
    "softshrink": "soft shrink",
    "abs": "absolute value",
    "abs_": "absolute value",
    "sign": "sign",
    "sgn": "sign",
    "floor": "rounding",
    "ceil": "rounding",
    "round": "rounding",
    "trunc": "rounding",
    "maximum": "maximum",
    "minimum": "minimum",
    "max": "maximum",
    "min": "minimum",
    "amax": "maximum",
    "amin": "minimum",
    "median": "median",
    "sort": "sorting",
    "topk": "sorting",
    "argmax": "choice by size",
    "argmin": "choice by size",
    "max_pool1d_with_indices": "max pooling",
    "max_pool2d_with_indices": "max pooling",
    "max_pool3d_with_indices": "max pooling",
    "mkldnn_max_pool2d": "max pooling",
    "adaptive_max_pool1d": "max pooling",
    "adaptive_max_pool2d": "max pooling",
    "adaptive_max_pool3d": "max pooling",
    "fractional_max_pool2d": "max pooling",
    "gt": "comparison",
    "ge": "comparison",
    "lt": "comparison",
    "le": "comparison",
}
"""Functions of aten with kinks or jumps, and what people call them."""


@dataclass(frozen=True)
class Kink:
    """A function that is not real-analytic, and the module that calls it."""

    module: str  # dotted name, "" for the network itself
    what: str

    def __str__(self) -> str:
        """For messages."""
        return f"{self.what} in {self.module or 'the forward of the network itself'}"


def find_kinks(model: nn.Module, inputs: Inputs) -> list[Kink]:
    """What one forward in eval mode calls that is not real-analytic in the weights, each kind once a module.

    A network of affine layers, normalisations with eps > 0, softmax and smooth activations (softplus, tanh, sigmoid, GELU, SiLU) has
    none, and then its features are real-analytic in its weights: the assumption of Kawaguchi & Sun 2021. Functions that
    depend on the inputs alone are listed too.

    Args:
        model: any module.
        inputs: samples; the first is used.

    Example:
        >>> import torch
        >>> [str(kink) for kink in find_kinks(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.ones(1, 2))]
        ['ReLU in 1']
    """
    few = take(inputs, slice(min(1, sample_count(inputs))))
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch()

    def enter(module: nn.Module, _: tuple[Any, ...]) -> None:
        watch.inside.append(names.get(module, ""))

    def leave(*_: Any) -> None:
        watch.inside.pop()

    module = StatelessModule(model)
    handles = [layer.register_forward_pre_hook(enter) for layer in names]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in names]
    watched_forward(module, few, handles, within=watch)
    return list(dict.fromkeys(watch.kinks))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: list[str] = []
        self.kinks: list[Kink] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        what = KINKED.get(func.overloadpacket.__name__)
        floating = any(isinstance(value, Tensor) and value.is_floating_point() for value in args)
        if what is not None and floating:
            self.kinks.append(Kink(self.inside[-1] if self.inside else "", what))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Smoothed:
    """A network with smooth activations."""

    model: nn.Module
    swapped: tuple[str, ...]  # dotted names of the activations that are softplus now
    left: tuple[
        Kink, ...
    ]  # what could not be swapped; empty if the network is real-analytic now, provided that ``watched``
    watched: bool = True  # a forward was run, so that functions called inside it are in ``left`` too; False: modules only, by their type


def softplus(beta: float) -> nn.Softplus:
    """ln(1 + exp(beta z)) / beta: within ln(2) / beta of ReLU.

    torch's softplus turns linear above a threshold, beta z = 20 by default; at 40 the two branches agree to the last bit in float64.
    """
    return nn.Softplus(beta=beta, threshold=40.0)


class LeakySoftplus(nn.Module):
    """slope z + (1 - slope) softplus(z): the smooth twin of a leaky ReLU."""

    def __init__(self, slope: float, beta: float) -> None:
        super().__init__()
        self.slope, self.smooth = slope, softplus(beta)

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise."""
        result: Tensor = self.slope * z + (1 - self.slope) * self.smooth(z)
        return result


class SoftplusSix(nn.Module):
    """softplus(z) - softplus(z - 6): the smooth twin of ReLU6."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.smooth = softplus(beta)

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise."""
        result: Tensor = self.smooth(z) - self.smooth(z - 6)
        return result


_TWINS: dict[type[nn.Module], Callable[[Any, float], nn.Module]] = {
    nn.ReLU: lambda _, beta: softplus(beta),
    nn.LeakyReLU: lambda layer, beta: LeakySoftplus(layer.negative_slope, beta),
    nn.ReLU6: lambda _, beta: SoftplusSix(beta),
}


_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip
_KINKED_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "ReLU",
    nn.ReLU6: "hard tanh or ReLU6",
    nn.Hardtanh: "hard tanh or ReLU6",
    nn.LeakyReLU: "leaky ReLU",
    nn.RReLU: "RReLU",
    nn.PReLU: "PReLU",
    nn.Threshold: "threshold",
    nn.ELU: "ELU, SELU or CELU",
    nn.SELU: "ELU, SELU or CELU",
    nn.CELU: "ELU, SELU or CELU",
    nn.Hardswish: "hard swish",
    nn.Hardsigmoid: "hard sigmoid",
    nn.Hardshrink: "hard shrink",
    nn.Softshrink: "soft shrink",
    **dict.fromkeys(_POOLS, "max pooling"),
}


def make_analytic(model: nn.Module, inputs: Inputs | None = None, *, beta: float = 100.0) -> Smoothed:
    """A copy of ``model`` with softplus activations in the place of ReLU, leaky ReLU and ReLU6, and what else has kinks.

    Only modules can be swapped; a ``torch.relu`` inside a forward is listed in ``left``, as is max pooling, which has no smooth
    twin that computes the same.

    Args:
        model: any module; it stays as it is.
        inputs: samples, to see what is left. None: the modules are swapped all the same, but of what is left only modules are known,
            by their type, and ``watched`` is False: a ``torch.relu`` inside a forward shows when it runs, and not before.
        beta: sharpness: the activations move by at most ln(2) / beta each.

    Raises:
        ValueError: ``beta`` is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta: {beta}; need a positive sharpness, such as 100")
    twin = copy.deepcopy(model)
    swapped = []
    new: dict[int, nn.Module] = {}  # a module that stands in several places is swapped by one
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
    kinks = (
        (name, next((what for kind, what in _KINKED_MODULES.items() if isinstance(m, kind)), None))
        for name, m in twin.named_modules()
    )
    return Smoothed(
        twin, tuple(swapped), tuple(Kink(name, what) for name, what in kinks if what is not None), watched=False
    )
