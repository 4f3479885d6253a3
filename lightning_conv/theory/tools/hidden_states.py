"""Comparison of a network with its start: units that are active or have switched, and the movement of hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_conv.networks.evaluation import BatchNormMode, StatelessModule
from lightning_conv.networks.inputs import Inputs, input_tensors, sample_count, take
from lightning_conv.networks.watched import entering, watched_forward

SAMPLES_AT_ONCE = 128
"""Number of samples that go through the network at once."""

KINKED_AT_ZERO = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "_prelu_kernel"})
"""Functions of aten with a kink at zero, whose units are either active or not."""


@dataclass
class Activity:
    """Result of one forward pass of all samples, accumulated over parts of them."""

    units: int = 0  # (sample, unit) pairs of the activations with a kink at zero
    active: int = 0
    changed: float = 0.0
    drifts: list[float] = field(default_factory=list)  # max_i |h_i - h_i(0)| of every layer
    sizes: list[float] = field(default_factory=list)  # max_i |h_i(0)|
    smallest: float = math.inf  # min over i and l of |h_{i,l}(0)|, without the input itself
    largest: float = -math.inf

    @property
    def drift(self) -> float:
        """Largest drift of all layers; NaN: there are no hidden states to compare."""
        return max(self.drifts, default=math.nan)

    @property
    def relative_drift(self) -> float:
        """Largest drift / size of all layers."""
        return max(
            (drift / size for drift, size in zip(self.drifts, self.sizes, strict=True) if size > 0), default=math.nan
        )

    def quantities(self) -> dict[str, float]:
        """Return the finite quantities by name.

        Keys, as far as the network has them: ``active_fraction``, ``sign_changes`` (shares of units), ``forward_drift``,
        ``forward_drift_relative``, ``hidden_norm_min``, ``hidden_norm_max``.
        """
        found: dict[str, float] = {}
        if self.units:
            found |= {"active_fraction": self.active / self.units, "sign_changes": self.changed / self.units}
        found |= {"forward_drift": self.drift, "forward_drift_relative": self.relative_drift}
        if self.smallest <= self.largest:
            found |= {"hidden_norm_min": self.smallest, "hidden_norm_max": self.largest}
        return {name: value for name, value in found.items() if not math.isnan(value)}


def pattern_changes(now: Tensor, initial: Tensor) -> float:
    """Compute the share of (sample, neuron) pairs whose activation differs, the mean of 1{sign z_ir != sign z_ir(0)}.

    A neuron is active if z >= 0, as in Du, Zhai, Poczos, Singh 2019.

    Args:
        now: Pre-activations z_ir = w_r . x_i, (n, m).
        initial: Pre-activations at the start, (n, m).

    Raises:
        ValueError: The shapes differ.

    Source: Du, Zhai, Poczos, Singh 2019, section 5.
    """
    if now.shape != initial.shape:
        raise ValueError(
            f"now: shape {tuple(now.shape)} against {tuple(initial.shape)}; need the same samples and neurons"
        )
    return float(((now >= 0) != (initial >= 0)).double().mean())


def forward_drift(now: Sequence[Tensor], then: Sequence[Tensor]) -> float:
    """Compute max |h_{i,l} - h_{i,l}(0)| over the samples i and the layers l.

    Args:
        now: Hidden states by layer, each (n, units).
        then: Hidden states at the start, of the same shapes.

    Raises:
        ValueError: The numbers of layers or the shapes differ.
    """
    shapes = [[tuple(h.shape) for h in states] for states in (now, then)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"then: shapes {shapes[1]} against {shapes[0]}; pass states of the same network and samples")
    return max(
        float(torch.linalg.vector_norm(h.double() - start.double(), dim=1).max())
        for h, start in zip(now, then, strict=True)
    )


def activity(
    network: nn.Module, inputs: Inputs, start: Mapping[str, Tensor], *, batch_norm: BatchNormMode = "frozen"
) -> Activity | None:
    """Measure the active units of ReLUs, leaky ReLUs and PReLUs, switched units, and the drift of hidden states.

    A hidden state is the input of a linear or convolutional layer, with one row per sample. The input of the network
    itself is not counted among the hidden norms. The initial states come from a second forward pass with the initial
    weights, so that no states are kept.

    Args:
        network: The network; it is not changed.
        inputs: n samples, on the network's device.
        start: Initial weights w_0 by name.
        batch_norm: With ``"frozen"``, each set of weights uses its own statistics of these samples. With ``"eval"``,
            the result is None for a network with BatchNorm, because its running statistics at the start are not known.

    Returns:
        The measurements, or None (see ``batch_norm``).

    Cost: two forward passes, at the initial weights one; memory for the hidden states of 128 samples, or of all samples if the network has
    BatchNorm.
    """
    normalised = any(isinstance(module, _BatchNorm) for module in network.modules())
    if normalised and batch_norm == "eval":
        return None
    # In one forward pass of all samples, their batch statistics are those of "frozen".
    module = StatelessModule(network, batch_norm="batch" if normalised else "eval")
    first = {name: value.to(module.parameters[name]) for name, value in start.items()}
    moved = any(not torch.equal(value, module.parameters[name]) for name, value in first.items())
    found, n = Activity(), sample_count(inputs)
    for part in _parts(inputs, n if normalised else SAMPLES_AT_ONCE):
        now = _look(module, part, {})
        then = _look(module, part, first) if moved else now
        for z, z_0 in zip(now.entering_relu, then.entering_relu, strict=True):
            found.units += z.numel()
            found.active += int((z > 0).sum())
            found.changed += pattern_changes(z, z_0) * z.numel()
        drifts = [forward_drift([h], [h_0]) for h, h_0 in zip(now.states, then.states, strict=True)]
        norms = [h_0.double().norm(dim=1) for h_0 in then.states]
        sizes = [float(each.max()) for each in norms]
        for norm, own_input in zip(norms, then.are_inputs, strict=True):
            if not own_input:
                found.smallest, found.largest = (
                    min(found.smallest, float(norm.min())),
                    max(found.largest, float(norm.max())),
                )
        found.drifts = [max(pair) for pair in zip(found.drifts or drifts, drifts, strict=True)]
        found.sizes = [max(pair) for pair in zip(found.sizes or sizes, sizes, strict=True)]
    return found


@dataclass
class _Seen:
    entering_relu: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    are_inputs: list[bool] = field(default_factory=list)  # whether a state is the input of the network itself


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, seen: _Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in KINKED_AT_ZERO:
            self._seen.entering_relu.append(args[0].detach().clone())  # a copy, since the function may work in place
        return func(*args, **(kwargs or {}))


def _look(module: StatelessModule, inputs: Inputs, weights: Mapping[str, Tensor]) -> _Seen:
    seen, n = _Seen(), sample_count(inputs)

    def enter(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        state = entering(args, kwargs)
        if state.ndim > 1 and len(state) == n:
            seen.states.append(state.flatten(1).clone())
            seen.are_inputs.append(any(_same(seen.states[-1], given) for given in input_tensors(inputs)))

    layers = [layer for layer in module.model.modules() if isinstance(layer, (nn.Linear, _ConvNd))]
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    watched_forward(module, inputs, handles, parameters=weights, within=_Watch(seen))
    return seen


def _same(state: Tensor, given: Tensor) -> bool:
    return state.numel() == given.numel() and torch.equal(state, given.detach().to(state).reshape(state.shape))


def _parts(inputs: Inputs, size: int) -> Iterator[Inputs]:
    for start in range(0, sample_count(inputs), size):
        yield take(inputs, slice(start, start + size))
