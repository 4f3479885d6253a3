"""Which units of a network are active on which sample: pre-activations, packed activation patterns, and how many changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_conv.networks.evaluation import Inputs, StatelessModule, sample_count, take
from lightning_conv.networks.watched import watched_forward

RECTIFIERS = ("relu", "relu_", "leaky_relu", "leaky_relu_")
"""Functions of aten whose kink is at zero."""

BLOCK = 256
"""Samples passed through the network at once."""


@dataclass(frozen=True)
class LayerPattern:
    """The signs of one layer's pre-activations on n samples."""

    name: str  # dotted name of the module that calls the ReLU, with "#2" for its second call
    units: int  # numbers a sample
    bits: Tensor  # (n, ceil(units / 8)), uint8: bit k of a row says whether pre-activation k is positive

    @property
    def active_fraction(self) -> Tensor:
        """Share of the units that are active on each sample, (n,)."""
        return _ones(self.bits.numpy()) / self.units


@dataclass(frozen=True)
class ActivationPatterns:
    """D_{i,l} of all layers l and samples i: one bit a unit and sample."""

    layers: tuple[LayerPattern, ...]

    @property
    def samples(self) -> int:
        """n."""
        return len(self.layers[0].bits)

    def changes(self, other: ActivationPatterns) -> Tensor:
        """|D_{i,l} - D'_{i,l}|_0: units that are active in exactly one of the two, (layers, n), int64.

        Raises:
            ValueError: the two are not of the same layers and samples.
        """
        mine, theirs = ([(p.name, p.units, len(p.bits)) for p in patterns.layers] for patterns in (self, other))
        if mine != theirs:
            raise ValueError(f"other: layers (name, units, samples) {theirs} against {mine}; take both on the same set")
        pairs = zip(self.layers, other.layers, strict=True)
        return torch.stack([_ones(here.bits.numpy() ^ there.bits.numpy()) for here, there in pairs]).long()

    def changed_fraction(self, other: ActivationPatterns) -> Tensor:
        """Mean over the samples of the share of units that changed, (layers,)."""
        units = torch.tensor([pattern.units for pattern in self.layers], dtype=torch.float64)
        return self.changes(other).double().mean(1) / units


def _ones(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(np.bitwise_count(bits).sum(1, dtype=np.int64)).double()


def pack(preactivations: Tensor) -> Tensor:
    """The signs z > 0 of (n, units) numbers, eight to a byte: (n, ceil(units / 8)), uint8."""
    return torch.from_numpy(np.packbits((preactivations > 0).cpu().numpy(), axis=1))


def activation_patterns(model: nn.Module, inputs: Inputs, *, block: int = BLOCK) -> ActivationPatterns:
    """The activation pattern of every ReLU (or leaky ReLU) of a network, in the order of its forward.

    A unit is active where z > 0, as torch differentiates ReLU. (Allen-Zhu et al. have z >= 0; the two differ
    where a pre-activation is exactly zero.) The network is read in eval mode and left as it was.

    Args:
        model: any module that calls ``relu`` or ``leaky_relu``, as a module or as a function.
        inputs: n samples.
        block: samples at once.

    Raises:
        ValueError: the forward calls no ReLU, or one on something whose first dimension is not the sample.

    Cost: one forward; n bits a unit are kept.

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
    """What enters every ReLU (or leaky ReLU), by name, each (n, units); arguments as in ``activation_patterns``.

    Raises:
        ValueError: see ``activation_patterns``.

    Cost: one forward; n numbers a unit are kept.
    """
    blocks = _by_block(model, inputs, block, lambda z: z)
    return {name: torch.cat([found[name] for found in blocks]) for name in blocks[0]}


def _by_block(
    model: nn.Module, inputs: Inputs, block: int, keep: Callable[[Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """What ``keep`` makes of every pre-activation, block by block.

    Raises:
        ValueError: no ReLU, or samples along another dimension than the first.
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
    """Keeps what enters the rectifiers, under the name of the module inside which they are called."""

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
