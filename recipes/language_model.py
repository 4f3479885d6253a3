"""A small GPT as a plain `torch.nn` module: the network of the recipe `lora`, and of the benchmark of language models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_conv.checked import checked, whole

SPREAD = 0.02
"""Standard deviation of the initial weights, as in GPT-2."""


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the attention of each position to those before it, (n, T, width)."""
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.proj(found.transpose(1, 2).reshape(n, length, width))
        return mixed


class MLP(nn.Module):
    """Two linear layers with a GELU between them, the hidden one four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (n, T, width)."""
        found: Tensor = self.proj(F.gelu(self.fc(x), approximate="tanh"))
        return found


class Block(nn.Module):
    """A block of GPT-2: attention and MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (n, T, width)."""
        x = x + self.attn(self.ln_1(x))
        summed: Tensor = x + self.mlp(self.ln_2(x))
        return summed


class GPT(nn.Module):
    r"""A decoder of the form of GPT-2: takes tokens (n, T) and returns the logits of the next one, (n, T, V).

    Modules: `wte` and `wpe` (embeddings of tokens and positions), the blocks `h.0`, `h.1`, ..., `ln_f` and `head`. With V = 50,257, 1,024
    positions, width 768, 12 blocks and 12 heads it has the 124,439,808 parameters of GPT-2's smallest model. There is no dropout.

    Args:
        vocabulary: V, number of tokens.
        positions: greatest number of positions.
        width: numbers per position; a multiple of `heads`.
        depth: number of blocks.
        heads: heads of the attention.
        tied: whether `head` has the weights of `wte`.

    Raises:
        ValueError: a size is not positive, or `width` is no multiple of `heads`.

    Source: Radford et al. 2019 ("Language models are unsupervised multitask learners"), section 2.3: the weights of layers that are
    added to the residual stream are scaled by 1 / sqrt(2 `depth`) at the start.
    """

    @checked(vocabulary=whole(1), positions=whole(1), width=whole(1), depth=whole(1), heads=whole(1))
    def __init__(
        self, vocabulary: int, positions: int, *, width: int = 128, depth: int = 3, heads: int = 4, tied: bool = True
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: {width} is no multiple of heads={heads}; take {heads * (width // heads + 1)}")
        self.positions = positions
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=SPREAD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.h:
            for added in (block.attn.proj, block.mlp.proj):  # type: ignore[union-attr]
                nn.init.normal_(added.weight, std=SPREAD / (2 * depth) ** 0.5)  # type: ignore[union-attr, arg-type]
        if tied:
            self.head.weight = self.wte.weight

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, (n, T, V).

        Raises:
            ValueError: there are more of them than `positions`.
        """
        length = tokens.shape[1]
        if length > self.positions:
            raise ValueError(f"tokens: {length} positions, and the network has embeddings of {self.positions}")
        # One row of positions per sample: what is looked up then has the samples in a dimension, as layer rules of the kernel need it.
        x = self.wte(tokens) + self.wpe(torch.arange(length, device=tokens.device).expand(len(tokens), -1))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.head(self.ln_f(x))
        return logits
