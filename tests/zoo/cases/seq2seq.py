"""Sequence to sequence: LSTMs over a dict, nn.Transformer, cell by cell."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import rows, table, tokens
from torch import Tensor, nn


class Seq2Seq(nn.Module):
    """An LSTM reads the source, another one writes the target."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(12, 6), nn.Embedding(12, 6)
        self.encoder, self.decoder = nn.LSTM(6, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.out = nn.Linear(6, 12)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.source(source))
        return self.out(self.decoder(self.target(target), state)[0])


FEW = {"source": tokens(5, count=6), "target": tokens(4, count=6, seed=14)}


@case(
    "seq2seq",
    "dict batches",
    "recurrent",
    data=rows(3, **FEW),
    call=lambda m, b: m.net(b["source"], b["target"][:, :-1]),
)
class Seq2SeqOverADict(Task):
    """Teacher forcing with LSTMs over a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Seq2Seq()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch["source"], batch["target"][:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), batch["target"][:, 1:], label_smoothing=0.1)


@case(
    "seq2seq",
    "sequence and image outputs",
    data=table(*FEW.values(), batch_size=3),
    call=lambda m, b: m(b[0], b[1][:, :-1]),
)
class TransformerSeq2Seq(Task):
    """nn.Transformer with a causal mask for the target."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.net = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        hidden = self.embedding(target)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=hidden.dtype)
        return self.out(self.net(self.embedding(source), hidden, tgt_mask=mask, tgt_is_causal=True))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        source, target = batch
        return F.cross_entropy(self(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())


def unrolled(module: Any, batch: Any) -> Tensor:
    state, token, out = module.encode(batch["source"]), batch["target"][:, 0], []
    for step in range(batch["target"].shape[1] - 1):
        state = module.cell(module.embedding(token), state)
        out.append(module.out(state))
        token = batch["target"][:, step + 1]
    return torch.stack(out, 1)


@case("seq2seq", "several calls", "recurrent", data=rows(3, **FEW), call=(unrolled, lambda m, b: unrolled(m, b)[:, -1]))
class CellByCell(Task):
    """A decoder called once per token: the last call, or all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell, self.out = nn.Embedding(12, 6), nn.GRUCell(6, 6), nn.Linear(6, 12)

    def encode(self, source: Tensor) -> Tensor:
        return self.embedding(source).mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(unrolled(self, batch).transpose(1, 2), batch["target"][:, 1:])
