"""How a step calls its network: by keyword, with optional arguments, for a tuple or an object, without ``forward``."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from case import Reading, Task, case
from samples import floats, padding, rows, table, tokens
from torch import Tensor, nn

from cases.batches import VALUE, X, Y, mlp

IDS, MASK = tokens(6), padding(6)


class Encoder(nn.Module):
    """A mean over the tokens that are not padding, after one layer of attention."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.head = nn.Linear(8, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.layer(self.embedding(input_ids), src_key_padding_mask=mask == 0)
        weight = mask[..., None].to(hidden.dtype)
        return scale * self.head((hidden * weight).sum(1) / weight.sum(1))


@case(
    "keyword and optional arguments",
    "masks and lengths",
    data=rows(input_ids=IDS * MASK, attention_mask=MASK, labels=Y),
    call=lambda m, b: m(b["input_ids"], b["attention_mask"]),
)
class OptionalMask(Task):
    """The signature of Hugging Face's models; a guess that drops the mask measures another network."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.encoder(input_ids, attention_mask)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])


@case(
    "keyword and optional arguments",
    "masks and lengths",
    data=rows(input_ids=IDS * MASK, attention_mask=MASK, labels=VALUE),
    call=lambda m, b: m.encoder(b["input_ids"], b["attention_mask"], scale=2.0),
)
class KeywordOnly(Task):
    """Keyword-only arguments, one of them a number."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.encoder(attention_mask=batch["attention_mask"], input_ids=batch["input_ids"], scale=2.0)
        return F.mse_loss(out, batch["labels"])


@dataclass
class ModelOutput:
    """What a model returns that computes its own loss."""

    loss: Tensor | None
    logits: Tensor


@case(
    "keyword and optional arguments",
    "output objects",
    data=rows(input_ids=IDS, attention_mask=MASK, labels=Y),
    call=lambda m, b: m(b["input_ids"], b["attention_mask"]).logits,
)
class LossInside(Task):
    """self(**batch).loss, as with Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ModelOutput:
        logits = self.encoder(input_ids, attention_mask)
        return ModelOutput(None if labels is None else F.cross_entropy(logits, labels), logits)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch).loss


@case("output objects", data=table(X, Y), call=lambda m, b: m(b[0]).logits)
class LossOutside(Task):
    """An object with .logits, whose loss the step computes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss_fn = mlp(), nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> ModelOutput:
        return ModelOutput(None, self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_fn(self(batch[0]).logits, batch[1])


@case("tuples of outputs", data=table(X, Y), call=lambda m, b: m(b[0])[0])
class OutputsAndFeatures(Task):
    """(logits, detached features): one carries the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x).tanh()
        return self.head(features), features.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, features = self(batch[0])
        self.log("norm", features.norm())
        return F.cross_entropy(logits, batch[1])


@case("tuples of outputs", "masks and lengths", data=table(floats(5, 3), Y), call=lambda m, b: m(b[0])[1])
class AttentionFirst(Task):
    """(attention weights, logits): the loss reads the second."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(3, 1, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, weights = self.attention(x, x, x)
        return weights.detach(), self.head(mixed.mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[1], batch[1])


@case("tuples of outputs", "nested batches", data=table(X, VALUE, Y), call=lambda m, b: torch.cat(m(b[0]), 1))
class TwoHeads(Task):
    """(value, logits), both in the loss: the network has four outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.value, self.kind = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.value(features), self.kind(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        value, kind = self(batch[0])
        return F.mse_loss(value, batch[1]) + 0.5 * F.cross_entropy(kind, batch[2])


@case("no forward", data=table(X, Y), call=lambda m, b: m.net(b[0]))
class NetInStep(Task):
    """The step calls self.net; there is no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@case("no forward", data=table(X, Y), call=lambda m, b: m.head(m.trunk(b[0]).relu()))
class TrunkAndHead(Task):
    """The step calls a trunk, a function, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.loss_fn = nn.Linear(6, 9), nn.Linear(9, 3), nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_fn(self.head(self.trunk(batch[0]).relu()), batch[1])


@case("no forward", data=table(X, VALUE), expected="needs one argument", call=Reading(lambda m, b: m.net.forward(b[0])))
class ForwardByName(Task):
    """The step calls self.net.forward(x), which fires no hook."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net.forward(batch[0]), batch[1])
