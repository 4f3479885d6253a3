"""``unit_activity``: which units of a network are dead, saturated or constant on some samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_conv.health.layers.checked import require_samples
from lightning_conv.networks.batch_norm import BatchStatistics
from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.undisturbed import undisturbed

aten = torch.ops.aten

HALF_RECTIFIED = {aten.relu.default, aten.relu_.default, aten.hardswish.default}
"""Activations that are 0, with slope 0, from some input on."""

BOUNDED: Mapping[Any, tuple[float, float]] = {
    aten.tanh.default: (-1.0, 1.0),
    aten.tanh_.default: (-1.0, 1.0),
    aten.sigmoid.default: (0.0, 1.0),
    aten.sigmoid_.default: (0.0, 1.0),
    aten.hardsigmoid.default: (0.0, 1.0),
}
"""Activations with two ends, at which their slope vanishes."""

SMOOTH = {
    aten.gelu.default,
    aten.silu.default,
    aten.silu_.default,
    aten.elu.default,
    aten.softplus.default,
    aten.leaky_relu.default,
}

SATURATED = 0.01
"""Distance from an end of a bounded activation, relative to the distance of the ends, at which a unit counts as saturated."""


@dataclass(frozen=True)
class LayerActivity:
    """The units of one activation.

    Attributes:
        name: Dotted name of the module whose forward computes it, with its number there if there are several.
        units: How many there are: channels of images and of sequences from convolutions, otherwise the last axis.
        dead: Numbers of the units that are 0 for all samples and places, where the slope is 0, too.
        saturated: Numbers of those that are within ``SATURATED`` of one end for all of them.
        constant: Numbers of those that have one value for all of them.
        after: Dotted name of the last module with weights of its own that was called before it; empty: there was none, or it has no name.
    """

    name: str
    units: int
    dead: tuple[int, ...]
    saturated: tuple[int, ...]
    constant: tuple[int, ...]
    after: str = ""

    @property
    def is_out(self) -> bool:
        """Return whether no unit lets anything through: all are dead, saturated or constant."""
        return len({*self.dead, *self.saturated, *self.constant}) == self.units


def unit_activity(
    model: nn.Module,
    inputs: Inputs,
    *,
    batch_norm: BatchNormMode = "eval",
    statistics: BatchStatistics | None = None,
) -> list[LayerActivity]:
    """Find the units of all activations that say nothing about the samples; functions such as ``F.relu`` count like modules.

    Args:
        model: The network; it is not changed.
        inputs: The samples.
        batch_norm: See ``ntk_gram``.
        statistics: Those of the samples at the present weights, where they are known, for ``"frozen"``; None: a forward finds them.

    Raises:
        TypeError: The model is no module, or the inputs are no tensors.
        ValueError: The inputs are not finite, ``batch_norm`` is unknown, or there are fewer than two samples, of which a
            unit could tell one from the other.

    Cost: one forward pass, and one more for statistics that are not known.
    """
    count = require_samples(model, inputs, batch_norm)
    watch = _Watch(count)
    with undisturbed(model), torch.no_grad():
        module = StatelessModule(
            model, batch_norm=batch_norm, statistics_of=inputs if statistics is None else statistics
        )
        with watch.inside(model), watch:
            module.call({}, module.convert(inputs))
    return watch.found


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what activations return while they are computed, and forgets it at once."""

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[LayerActivity] = []
        self._count = count
        self._open: list[str] = [""]
        self._after = ""
        self._times: dict[str, int] = {}
        self._channels: set[tuple[int, ...]] = (
            set()
        )  # shapes that a convolution, or a layer of channels after it, returned

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Know the name of the module that is called."""

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self._open.append(name)

        def leave(name: str, weighs: bool) -> Callable[..., None]:
            def left(*_: Any) -> None:
                self._open.pop()
                self._after = name if weighs else self._after

            return left

        handles = []
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                weighs = any(True for _ in module.parameters(recurse=False))
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave(name, weighs), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.is_floating_point() and made.ndim > 1:
            if "convolution" in str(func):
                self._channels.add(tuple(made.shape))
            half = func in HALF_RECTIFIED or _is_cut_at_zero(func, args, kwargs or {})
            ends = _ends(func, args)
            if (half or ends or func in SMOOTH) and len(made) == self._count:
                self.found.append(
                    self._looked_at(made, ends, zero=half or (ends is not None and ends[0] == 0 and ends[1] > 1))
                )
        return made

    def _looked_at(self, made: Tensor, ends: tuple[float, float] | None, *, zero: bool) -> LayerActivity:
        axis = 1 if made.ndim > 3 or tuple(made.shape) in self._channels else made.ndim - 1
        values = made.movedim(axis, 0).flatten(1)
        low, high = values.amin(1), values.amax(1)
        dead = (low == 0) & (high == 0) if zero else torch.zeros_like(low, dtype=torch.bool)
        saturated = torch.zeros_like(dead)
        if ends is not None:
            near = SATURATED * (ends[1] - ends[0])
            saturated = ((values - ends[0] <= near) | (ends[1] - values <= near)).all(1) & ~dead
        constant = (low == high) & ~dead & ~saturated
        name = self._open[-1]
        number = self._times[name] = self._times.get(name, 0) + 1
        shown = name or "the module"
        return LayerActivity(
            shown if number == 1 else f"{shown} ({number})",
            len(values),
            _numbers(dead),
            _numbers(saturated),
            _numbers(constant),
            self._after,
        )


def _ends(func: Any, args: tuple[Any, ...]) -> tuple[float, float] | None:
    """Return the two ends of a bounded activation; None: it is none. ``ReLU6`` is a ``hardtanh`` from 0 to 6."""
    if func in (aten.hardtanh.default, aten.hardtanh_.default):
        return float(args[1]) if len(args) > 1 else -1.0, float(args[2]) if len(args) > 2 else 1.0
    return BOUNDED.get(func)


def _is_cut_at_zero(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether this is ``clamp(min=0)``."""
    if func not in (aten.clamp.default, aten.clamp_.default, aten.clamp_min.default, aten.threshold.default):
        return False
    bounds = [*args[1:], *kwargs.values()]
    return bounds[:1] == [0] and all(each is None or each == 0 for each in bounds[1:])


def _numbers(chosen: Tensor) -> tuple[int, ...]:
    return tuple(chosen.nonzero().flatten().tolist())
