"""Activity of the units of a network on each sample: pre-activations, activation patterns, and their changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.watched import watched_forward

RECTIFIERS = ("relu", "relu_", "leaky_relu", "leaky_relu_")
"""Functions of aten with a kink at zero."""

BLOCK = 256
"""Number of samples that go through the network at once."""


@dataclass(frozen=True)
class LayerPattern:
    """The signs of one layer's pre-activations on n samples."""

    name: str  # dotted name of the module that calls the ReLU, with "#2" for its second call
    units: int  # per sample
    bits: Tensor  # (n, ceil(units / 8)), uint8: bit k of a row says whether pre-activation k is positive

    @property
    def active_fraction(self) -> Tensor:
        """Share of the units that are active on each sample, (n,)."""
        return _ones(self.bits.numpy()) / self.units


@dataclass(frozen=True)
class ActivationPatterns:
    """D_{i,l} of all layers l and samples i, with one bit per unit and sample."""

    layers: tuple[LayerPattern, ...]

    @property
    def samples(self) -> int:
        """Number n of samples."""
        return len(self.layers[0].bits)

    def changes(self, other: ActivationPatterns) -> Tensor:
        """Count the units that are active in exactly one of the two, |D_{i,l} - D'_{i,l}|_0, (layers, n), int64.

        Raises:
            ValueError: The two do not have the same layers and samples.
        """
        mine, theirs = ([(p.name, p.units, len(p.bits)) for p in patterns.layers] for patterns in (self, other))
        if mine != theirs:
            raise ValueError(f"other: layers (name, units, samples) {theirs} against {mine}; take both on the same set")
        pairs = zip(self.layers, other.layers, strict=True)
        return torch.stack([_ones(here.bits.numpy() ^ there.bits.numpy()) for here, there in pairs]).long()

    def changed_fraction(self, other: ActivationPatterns) -> Tensor:
        """Compute the share of units that changed, as a mean over the samples, (layers,)."""
        units = torch.tensor([pattern.units for pattern in self.layers], dtype=torch.float64)
        return self.changes(other).double().mean(1) / units


def _ones(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(np.bitwise_count(bits).sum(1, dtype=np.int64)).double()


def pack(preactivations: Tensor) -> Tensor:
    """Pack the signs z > 0 of (n, units) numbers, eight per byte: (n, ceil(units / 8)), uint8."""
    return torch.from_numpy(np.packbits((preactivations > 0).cpu().numpy(), axis=1))


def activation_patterns(model: nn.Module, inputs: Inputs, *, block: int = BLOCK) -> ActivationPatterns:
    """Compute the activation pattern of every ReLU (or leaky ReLU) of a network, in the order of its forward pass.

    A unit is active if z > 0, in agreement with torch's derivative of ReLU. (Allen-Zhu et al. have z >= 0; the two
    differ if a pre-activation is exactly zero.) The network is evaluated in eval mode and not changed.

    Args:
        model: Any module that calls ``relu`` or ``leaky_relu``, as a module or as a function.
        inputs: n samples.
        block: Number of samples at once.

    Raises:
        ValueError: The forward pass calls no ReLU, or calls one on a tensor whose first dimension is not the sample.

    Cost: one forward pass; memory for n bits per unit.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [(layer.name, layer.units) for layer in activation_patterns(net, torch.ones(5, 2)).layers]
        [('1', 3)]
    """
    blocks = _by_block(model, inputs, block, pack)
    sizes = {name: z.shape[1] for name, z in preactivations(model, take(inputs, slice(1))).items()}
    return ActivationPatterns(
        tuple(LayerPattern(name, sizes[name], torch.cat([found[name] for found in blocks])) for name in blocks[0])
    )


def preactivations(model: nn.Module, inputs: Inputs, *, block: int = BLOCK) -> dict[str, Tensor]:
    """Compute the inputs of every ReLU (or leaky ReLU), by name, each (n, units).

    Args:
        model: See ``activation_patterns``.
        inputs: n samples.
        block: Number of samples at once.

    Raises:
        ValueError: See ``activation_patterns``.

    Cost: one forward pass; memory for n numbers per unit.
    """
    blocks = _by_block(model, inputs, block, lambda z: z)
    return {name: torch.cat([found[name] for found in blocks]) for name in blocks[0]}


def _by_block(
    model: nn.Module, inputs: Inputs, block: int, keep: Callable[[Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """Apply ``keep`` to every pre-activation, block by block.

    Raises:
        ValueError: There is no ReLU, or the samples are not along the first dimension.
    """
    n = sample_count(inputs)
    names = {module: name for name, module in model.named_modules()}
    found: list[dict[str, Tensor]] = []
    module = StatelessModule(model)
    for start in range(0, n, block):
        watch = _Watch(min(block, n - start), keep)
        handles = [m.register_forward_pre_hook(watch.entering(name)) for m, name in names.items()]
        handles += [m.register_forward_hook(watch.leave, always_call=True) for m in names]
        watched_forward(module, take(inputs, slice(start, start + block)), handles, within=watch)
        found.append(watch.kept)
    if not found[0]:
        raise ValueError("model: its forward calls no ReLU (relu or leaky_relu); activation patterns are about these")
    return found


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the inputs of the rectifiers under the name of the module that calls them."""

    def __init__(self, samples: int, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples, self.keep = samples, keep
        self.inside: list[str] = []
        self.kept: dict[str, Tensor] = {}

    def entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self.inside.append(name)

    def leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in RECTIFIERS:
            z: Tensor = args[0]
            if z.ndim == 0 or z.shape[0] != self.samples:
                raise ValueError(
                    f"model: a ReLU on shape {tuple(z.shape)} for {self.samples} samples; need samples first"
                )
            base = self.inside[-1] if self.inside else ""
            name, call = base, 1
            while name in self.kept:
                call += 1
                name = f"{base}#{call}"
            # A copy: relu_ writes over it.
            self.kept[name] = self.keep(z.detach().reshape(self.samples, -1).clone())
        return func(*args, **(kwargs or {}))
