"""Low-rank adapters of linear layers: `LoRALinear`, and functions that put them into a network and merge them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_conv.checked import checked, real, whole


class LoRALinear(nn.Linear):
    r"""A frozen linear layer with a trainable low-rank term.

    .. math:: y = W x + b + \frac{\alpha}{r} B A x, \qquad A \in \mathbb{R}^{r \times \text{in}}, \; B \in \mathbb{R}^{\text{out} \times r}

    B is zero at the start, so that the network computes what it did; A is drawn uniformly like the weight of a linear layer. Trainable
    are `lora_A` and `lora_B` alone: `parameters="*lora_*"` selects them. The kernel over them begins with that of B, as the derivative by A
    is zero while B is.

    Args:
        in_features: number of inputs.
        out_features: number of outputs.
        rank: r.
        alpha: scale of the term.
        bias: whether there is a frozen bias.

    Raises:
        ValueError: the rank is not positive, or greater than the smaller side of W.

    Source: Hu et al. 2021 (2106.09685), section 4.1.
    """

    @checked(in_features=whole(1), out_features=whole(1), rank=whole(1), alpha=real())
    def __init__(
        self, in_features: int, out_features: int, *, rank: int = 8, alpha: float = 16.0, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank: got {rank}; need 1 to {min(in_features, out_features)}, the smaller side of a layer of "
                f"{in_features} inputs and {out_features} outputs"
            )
        self.rank, self.alpha = rank, alpha
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def around(cls, linear: nn.Linear, *, rank: int = 8, alpha: float = 16.0) -> Self:
        """Return a layer with the very weights of `linear`, which are then frozen, and a new low-rank term.

        Args:
            linear: the layer.
            rank: r.
            alpha: scale of the term.
        """
        made = cls(linear.in_features, linear.out_features, rank=rank, alpha=alpha, bias=linear.bias is not None).to(
            linear.weight
        )
        made.weight, made.bias = linear.weight.requires_grad_(False), linear.bias
        if made.bias is not None:
            made.bias.requires_grad_(False)
        return made

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs, (..., out)."""
        # B (A x) and not (B A) x: the product of the two matrices has the size of W.
        added: Tensor = F.linear(F.linear(inputs, self.lora_A), self.lora_B)
        return F.linear(inputs, self.weight, self.bias) + self.scaling * added

    def merged(self) -> nn.Linear:
        """Return a plain linear layer that computes the same, with W + alpha / r B A as its weights."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None).to(self.weight)
        with torch.no_grad():
            made.weight.copy_(self.weight + self.scaling * (self.lora_B @ self.lora_A))
            if self.bias is not None:
                made.bias.copy_(self.bias)
        return made

    @override
    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


@checked()
def add_adapters(
    network: nn.Module, names: Sequence[str] = ("*",), *, rank: int = 8, alpha: float = 16.0
) -> tuple[str, ...]:
    """Freeze a network and put low-rank adapters around its linear layers, in place.

    Args:
        network: the network.
        names: names or shell patterns of linear layers in it, such as `"*attn*"`.
        rank: r of each adapter.
        alpha: scale of each adapter.

    Returns:
        The names of the layers that have adapters now.

    Raises:
        ValueError: a pattern matches no linear layer; a layer has an adapter already; the rank does not fit.
    """
    linear = {name: each for name, each in network.named_modules() if isinstance(each, nn.Linear)}
    for pattern in names:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(f"names: {pattern!r} matches no linear layer; there are {', '.join(linear) or 'none'}")
    chosen = tuple(name for name in linear if any(fnmatchcase(name, pattern) for pattern in names))
    twice = [name for name in chosen if isinstance(linear[name], LoRALinear)]
    if twice:
        raise ValueError(
            f"names: {twice[0]} has an adapter already; merge_adapters(network) makes one weight of the two"
        )
    network.requires_grad_(False)
    for name in chosen:
        _exchange(network, name, LoRALinear.around(linear[name], rank=rank, alpha=alpha))
    return chosen


def merge_adapters(network: nn.Module) -> nn.Module:
    """Replace every `LoRALinear` in a network by the plain linear layer that computes the same, in place.

    A weight that was shared with another layer, such as that of an embedding, is no longer shared.

    Args:
        network: the network, which is returned.
    """
    adapted = [(name, each) for name, each in network.named_modules() if isinstance(each, LoRALinear)]
    for name, each in adapted:
        _exchange(network, name, each.merged())
    return network


def _exchange(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, layer)
