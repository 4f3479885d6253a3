"""One network, called several times in a step: pairs, triplets, two towers."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, table
from torch import Tensor

from cases.batches import X, Y, mlp

PAIRS = table(X, floats(6, seed=9), (Y == 0).float())


def both(*parts: Any) -> tuple[Any, Any]:
    """Return the answers for a network that a step calls several times: its last call, or all of them."""
    return parts[-1], lambda m, b: torch.cat([part(m, b) for part in parts], 1)


@case("several calls", data=PAIRS, call=both(lambda m, b: m(b[0]), lambda m, b: m(b[1])))
class Siamese(Task):
    """One encoder called on both halves of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        left, right, same = batch
        distance = (self(left) - self(right)).square().sum(1)
        return (same * distance + (1 - same) * F.relu(4 - distance)).mean()


@case(
    "several calls",
    data=table(X, floats(6, seed=9), floats(6, seed=10)),
    call=both(*(lambda m, b, i=i: m(b[i]) for i in range(3))),
)
class Triplet(Siamese):
    """Anchor, positive and negative through one encoder."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.triplet_margin_loss(*(self(each) for each in batch), margin=2.0)


@case(
    "several calls",
    "no forward",
    data=table(X, floats(4, seed=5)),
    call=both(lambda m, b: m.image(b[0]), lambda m, b: m.text(b[1])),
)
class Contrastive(Task):
    """Two towers and the contrastive loss of a batch, as CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = mlp(6, 5), mlp(4, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, text = F.normalize(self.image(batch[0])), F.normalize(self.text(batch[1]))
        logits, own = image @ text.T / 0.5, torch.arange(len(image))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
