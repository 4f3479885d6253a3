"""Embeddings: linear layers on one-hot tokens, without forming the one-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_conv.kernels.rules.registry import Arguments, LayerRule


class EmbeddingRule(LayerRule):
    r"""Rule of ``F.embedding(input, weight, padding_idx, ...)`` with tokens (N, ...) and weight (words, d).

    With w_r the word and b_r the output gradient at position r,

    .. math:: \partial u / \partial W_w = \sum_{r: w_r = w} b_r, \qquad
        \langle \partial u / \partial W, \partial u' / \partial W \rangle = \sum_{r, s: w_r = w'_s} b_r \cdot b'_s .
    """

    signature = "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    parameters = ("weight",)

    def holds(self, arguments: Arguments) -> bool:
        """Return False for ``max_norm``, which changes the table, and ``scale_grad_by_freq``, which scales gradients."""
        return arguments.get("max_norm") is None and not arguments.get("scale_grad_by_freq", False)

    def tokens(self, arguments: Arguments) -> Tensor:
        """Return the words, (N, R), with -1 at padding, which has no derivative."""
        words: Tensor = arguments["input"].flatten(1) if arguments["input"].ndim > 1 else arguments["input"][:, None]
        padding = arguments.get("padding_idx")
        if padding is None:
            return words
        # A negative row counts from the last (of F.embedding: to torch.embedding, which has no rule, -1 is "none").
        return words.masked_fill(words == padding % arguments["weight"].shape[0], -1)

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """Return the derivatives by the table, (N, K, words, d)."""
        del slot
        words = self.tokens(arguments)
        values = gradients.reshape(*gradients.shape[:2], -1, gradients.shape[-1])  # (N, K, R, d)
        values = values * (words >= 0)[:, None, :, None]
        table = torch.zeros(*values.shape[:2], *arguments["weight"].shape, dtype=values.dtype, device=values.device)
        index = words.clamp(min=0)[:, None, :, None].expand_as(values)
        return table.scatter_add_(2, index, values)
