"""Embeddings: linear layers on one-hot tokens, without the one-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, LayerRule


class EmbeddingRule(LayerRule):
    """``F.embedding(input, weight, padding_idx, ...)``: tokens (N, ...), weight (words, d).

    du/dW[w] = sum of b_r over the positions r that hold word w, so that the kernel is
    sum over pairs of positions with the same word of b_r . b_s: the overlap of two one-hot vectors is an equality.
    """

    signature = "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    parameters = ("weight",)

    def holds(self, arguments: Arguments) -> bool:
        """Not where the forward changes the table (``max_norm``) or the gradient is another one than the derivative."""
        return arguments.get("max_norm") is None and not arguments.get("scale_grad_by_freq", False)

    def tokens(self, arguments: Arguments) -> Tensor:
        """(N, R) words, -1 where a position has no derivative (padding)."""
        words: Tensor = arguments["input"].flatten(1) if arguments["input"].ndim > 1 else arguments["input"][:, None]
        padding = arguments.get("padding_idx")
        if padding is None:
            return words
        # A negative row counts from the last (of F.embedding: to torch.embedding, which has no rule, -1 is "none").
        return words.masked_fill(words == padding % arguments["weight"].shape[0], -1)

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """(N, K, words, d)."""
        del slot
        words = self.tokens(arguments)
        values = gradients.reshape(*gradients.shape[:2], -1, gradients.shape[-1])  # (N, K, R, d)
        values = values * (words >= 0)[:, None, :, None]
        table = torch.zeros(*values.shape[:2], *arguments["weight"].shape, dtype=values.dtype, device=values.device)
        index = words.clamp(min=0)[:, None, :, None].expand_as(values)
        return table.scatter_add_(2, index, values)
