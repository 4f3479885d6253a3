"""Losses that no function of torch is alone: of the user's own, multiples of the usual ones, token by token, masked, in pieces."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, padding, rows, table, tokens
from torch import Tensor, nn

from cases.batches import VALUE, X, Y, mlp
from cases.losses import Net, first


@case("own losses", data=table(X, Y), call=first)
class FocalByHand(Net):
    """Focal cross-entropy, a function in the step."""

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(logits, y, reduction="none")
        return ((1 - (-each).exp()).square() * each).mean()


@case("own losses", data=table(X, VALUE), call=first)
class Quantile(Net):
    """The pinball loss of three quantiles, summed over the samples."""

    def criterion(self, out: Tensor, y: Tensor) -> Tensor:
        share = torch.tensor([0.1, 0.5, 0.9])
        error = y - out
        return torch.maximum(share * error, (share - 1) * error).sum()


@case("own losses", data=table(X, Y, torch.rand(12, generator=torch.Generator().manual_seed(7))), call=first)
class WeightedSamples(Net):
    """Each sample has a weight in the batch; their sum divides."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        each = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (each * batch[2]).sum() / batch[2].sum()


@case("own losses", data=table(X), call=first)
class ContrastivePairs(Net):
    """Samples of a batch against each other: no loss of single samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = F.normalize(self(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T / 0.2, torch.arange(len(z)).roll(1))


@case("scaled losses", data=table(X, floats(3, seed=21)), call=first)
class HalfSquares(Net):
    """Half the sum of squares, as textbooks write it."""

    def criterion(self, out: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (out - y).square().sum()


@case("scaled losses", data=table(X, floats(3, seed=21)), call=first)
class SquaredNorm(Net):
    """The mean of |u - y|^2 over the samples alone."""

    def criterion(self, out: Tensor, y: Tensor) -> Tensor:
        return (out - y).norm(dim=1).square().mean()


@case("scaled losses", data=table(X, Y), call=first)
class Tempered(Net):
    """A tenth of a cross-entropy, through its own log-likelihood."""

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        return -0.1 * torch.distributions.Categorical(logits=logits).log_prob(y).mean()


@case("scaled losses", data=table(X, Y), call=first)
class WarmUp(Net):
    """A loss whose weight grows with the steps."""

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        return min(1.0, (1 + self.global_step) / 4) * F.cross_entropy(logits, y)


class Recurrent(Task):
    """A distribution over the words at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(12, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 12)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])


TOKENS = tokens(6)


@case("token by token", data=table(TOKENS), call=lambda m, b: m(b[0][:, :-1]))
class NextTokenFlat(Recurrent):
    """Flattened logits and labels, shifted before the call."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())


@case("token by token", data=table(TOKENS), call=first)
class NextTokenShifted(Recurrent):
    """Labels that are shifted after the call, as language models do it; classes along axis 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[:, :-1].transpose(1, 2), batch[0][:, 1:])


@case("token by token", data=table(TOKENS * padding(6), TOKENS), call=first)
class TaggedWords(Recurrent):
    """A label for each word, with padding that is left out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = torch.where(batch[0] == 0, -100, batch[1])
        return F.cross_entropy(self(batch[0]).flatten(0, 1), y.flatten())


@case("token by token", data=table(TOKENS, padding(6)), call=first)
class MaskedMean(Recurrent):
    """The mean over the tokens that a mask in the batch names."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, mask = batch
        each = F.cross_entropy(self(ids).transpose(1, 2), ids.roll(1, 1), reduction="none")
        return (each * mask).sum() / mask.sum()


class TwoHeads(Task):
    """One body, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.place = mlp(6, 5), nn.Linear(5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).tanh()
        return {"logits": self.kind(h), "boxes": self.place(h)}


def side_by_side(module: Any, batch: Any) -> Tensor:
    made = module(batch["x"])
    return torch.cat([made["logits"], made["boxes"]], 1)


@case("losses in pieces", "dict batches", data=rows(x=X, y=Y, box=floats(4, seed=22)), call=side_by_side)
class Detector(TwoHeads):
    """Classes and boxes in a dict, with a loss for each."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        made = self(batch["x"])
        return F.cross_entropy(made["logits"], batch["y"]) + 5 * F.smooth_l1_loss(made["boxes"], batch["box"])


@case("losses in pieces", "dict batches", data=rows(x=X, y=Y, box=floats(4, seed=22)), call=side_by_side)
class DetectorOfSome(TwoHeads):
    """Boxes count for some of the classes only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        made, some = self(batch["x"]), (batch["y"] > 0).float()
        boxes = (F.l1_loss(made["boxes"], batch["box"], reduction="none").mean(1) * some).sum() / len(some)
        return {"loss": F.cross_entropy(made["logits"], batch["y"]) + boxes}


@case(
    "losses in pieces",
    data=table(X, floats(6, seed=23)),
    call=lambda m, b: torch.cat([m.net(b[0]), m.net(b[1])], 1),
)
class TripletLike(Net):
    """One network called on two inputs, whose results are compared."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        left, right = self.net(batch[0]), self.net(batch[1])
        return F.relu(1 - F.cosine_similarity(left, right)).square().mean()
