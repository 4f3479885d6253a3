"""Real-analytic networks: find the functions of a network that are not real-analytic, and replace them."""

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
    function: what
    for what, functions in {
        "ReLU": "relu relu_",
        "threshold": "threshold",
        "clamp": "clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_",
        "hard tanh or ReLU6": "hardtanh hardtanh_",
        "leaky ReLU": "leaky_relu leaky_relu_",
        "RReLU": "rrelu_with_noise",
        "PReLU": "_prelu_kernel",
        "ELU, SELU or CELU": "elu elu_ celu celu_",
        "hard swish": "hardswish hardswish_",
        "hard sigmoid": "hardsigmoid",
        "hard shrink": "hardshrink",
        "soft shrink": "softshrink",
        "absolute value": "abs abs_",
        "sign": "sign sgn",
        "rounding": "floor ceil round trunc",
        "maximum": "maximum max amax",
        "minimum": "minimum min amin",
        "median": "median",
        "sorting": "sort topk",
        "choice by size": "argmax argmin",
        "max pooling": "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d",
        "comparison": "gt ge lt le",
    }.items()
    for function in functions.split()
}
"""Functions of aten with kinks or jumps, and their usual names."""


@dataclass(frozen=True)
class Kink:
    """A function that is not real-analytic, and the module that calls it."""

    module: str  # dotted name, "" for the network itself
    what: str

    def __str__(self) -> str:
        """Return the text for messages."""
        return f"{self.what} in {self.module or 'the forward of the network itself'}"


def find_kinks(model: nn.Module, inputs: Inputs) -> list[Kink]:
    """List the functions with kinks or jumps that one forward in eval mode calls, each kind once per module.

    A network of affine layers, normalisations with eps > 0, softmax and smooth activations (softplus, tanh, sigmoid,
    GELU, SiLU) has none. Its features are then real-analytic in its weights, which Kawaguchi & Sun 2021 assume. Functions
    that depend on the inputs alone are listed too.

    Args:
        model: any module.
        inputs: samples; only the first one is used.

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
    swapped: tuple[str, ...]
    """Dotted names of the activations that were replaced."""
    left: tuple[Kink, ...]
    """Functions that could not be replaced. If it is empty and ``watched`` is True, the network is real-analytic."""
    watched: bool = True
    """Whether a forward was run, so that ``left`` also lists functions called inside it. False: modules by type only."""


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


_KINKED_MODULES: dict[type[nn.Module], str] = {
    getattr(nn, kind): what
    for what, kinds in {
        "ReLU": "ReLU",
        "hard tanh or ReLU6": "ReLU6 Hardtanh",
        "leaky ReLU": "LeakyReLU",
        "RReLU": "RReLU",
        "PReLU": "PReLU",
        "threshold": "Threshold",
        "ELU, SELU or CELU": "ELU SELU CELU",
        "hard swish": "Hardswish",
        "hard sigmoid": "Hardsigmoid",
        "hard shrink": "Hardshrink",
        "soft shrink": "Softshrink",
        "max pooling": "MaxPool1d MaxPool2d MaxPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
        "FractionalMaxPool2d FractionalMaxPool3d",
    }.items()
    for kind in kinds.split()
}


def make_analytic(model: nn.Module, inputs: Inputs | None = None, *, beta: float = 100.0) -> Smoothed:
    """Copy ``model``, replace ReLU, leaky ReLU and ReLU6 by softplus activations, and list the kinks that are left.

    Only modules can be replaced. A ``torch.relu`` inside a forward is listed in ``left``, and so is max pooling, which has
    no smooth counterpart that computes the same.

    Args:
        model: any module; it is not modified.
        inputs: samples for a forward that detects what is left. None: no forward is run, ``left`` lists modules by their
            type only and ``watched`` is False, because a ``torch.relu`` inside a forward shows only when it runs.
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
    kinks = (
        (name, next((what for kind, what in _KINKED_MODULES.items() if isinstance(m, kind)), None))
        for name, m in twin.named_modules()
    )
    return Smoothed(
        twin, tuple(swapped), tuple(Kink(name, what) for name, what in kinks if what is not None), watched=False
    )
