"""Layers that keep state, draw or write: normalisation, reparametrization, recurrent cells, embeddings, lazy and compiled ones."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, labels, table, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cases.batches import VALUE, X, Y, mlp


class OfNet(Task):
    """Classification by ``self.net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def add(name: str, about: str, families: tuple[str, ...], data: Any, net: Any, **rest: Any) -> None:
    call = lambda m, b: m(b[0])  # noqa: E731 - the call of all of them
    case(*families, data=data, call=call, name=name, about=about, make=lambda: OfNet(net()), **rest)(OfNet)


IMAGES = table(floats(2, 6, 6), Y)
NORMALISED, RECURRENT, EMBEDDED, LAZY = (
    "normalised and reparametrized",
    "recurrent",
    "embeddings",
    "lazy, scripted, compiled",
)

add(
    "batch_norm",
    "BatchNorm and dropout in an MLP",
    (NORMALISED,),
    table(X, Y),
    lambda: nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 3)),
)
add(
    "conv_batch_norm",
    "Convolutions with BatchNorm and pooling",
    (NORMALISED,),
    IMAGES,
    lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ),
)
add(
    "other_norms",
    "GroupNorm, InstanceNorm and LayerNorm",
    (NORMALISED,),
    IMAGES,
    lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.Linear(64, 3),
    ),
)
add(
    "weight_norm",
    "weight_norm as a parametrization",
    (NORMALISED,),
    table(X, Y),
    lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(8, 3))
    ),
)
add(
    "old_weight_norm",
    "The old weight_norm, whose weight is a tensor with a graph",
    (NORMALISED,),
    table(X, Y),
    lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
)
add(
    "spectral_norm",
    "spectral_norm, which iterates in every training forward",
    (NORMALISED,),
    table(X, Y),
    lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.LeakyReLU(0.2), nn.Linear(8, 3)),
)


class LastState(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


SERIES = table(floats(5, 3), Y)
add(
    "lstm",
    "Two LSTM layers with dropout between them",
    (RECURRENT,),
    SERIES,
    lambda: LastState(nn.LSTM(3, 5, 2, batch_first=True, dropout=0.2), 5),
)
add(
    "gru",
    "A bidirectional GRU",
    (RECURRENT,),
    SERIES,
    lambda: LastState(nn.GRU(3, 4, batch_first=True, bidirectional=True), 8),
)
add(
    "bag",
    "EmbeddingBag over lists of ids of one length",
    (EMBEDDED,),
    table(tokens(5), Y),
    lambda: nn.Sequential(nn.EmbeddingBag(12, 6, mode="mean"), nn.Linear(6, 3)),
)
add(
    "max_norm",
    "An embedding that renormalises its rows in every forward",
    (EMBEDDED,),
    table(tokens(4), Y),
    lambda: nn.Sequential(nn.Embedding(12, 6, max_norm=0.5), nn.Flatten(), nn.Linear(24, 3)),
)


@case(EMBEDDED, data=table(tokens(5), torch.arange(12) % 4, Y), call=lambda m, b: m(b[0], b[1]))
class SparseBag(Task):
    """Sparse embeddings with offsets, and an optimizer for them."""

    lr = 0.02

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.user, self.head = (
            nn.EmbeddingBag(12, 6, mode="sum", sparse=True),
            nn.Embedding(4, 6, sparse=True),
            nn.Linear(6, 3),
        )

    def forward(self, ids: Tensor, user: Tensor) -> Tensor:
        offsets = torch.arange(len(ids)) * ids.shape[1]
        return self.head(self.bag(ids.flatten(), offsets) + self.user(user))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0], batch[1]), batch[2])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


@case(EMBEDDED, data=table(tokens(1), tokens(1, seed=19), VALUE), call=lambda m, b: m(b[0], b[1]))
class Recommender(Task):
    """Factors of users and items with biases: a product of two embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.bias = nn.Embedding(12, 4), nn.Embedding(12, 4), nn.Embedding(12, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(-1) + self.bias(item)[..., 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0], batch[1]), batch[2])


add(
    "lazy",
    "Lazy layers, initialised by the first batch",
    (LAZY,),
    table(X, Y),
    lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)),
)
add(
    "scripted_trunk",
    "A scripted trunk under an ordinary head",
    (LAZY,),
    table(X, Y),
    lambda: nn.Sequential(scripted(), nn.Linear(8, 3)),
)
add("compiled_net", "torch.compile of the network", (LAZY,), table(X, Y), lambda: torch.compile(mlp(), backend="eager"))
add("checkpointed", "Gradient checkpointing", (LAZY,), table(X, Y), lambda: Checkpointed(mlp(6, 8), nn.Linear(8, 3)))


def scripted() -> nn.Module:
    """Return a scripted trunk whose executor has seen enough calls: until then its rounding depends on their number, in any run."""
    trunk = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Tanh()))
    for _ in range(4):
        torch.autograd.grad(trunk(torch.ones(4, 6)).sum(), trunk.parameters())
    return trunk


class Checkpointed(nn.Module):
    """A trunk whose activations are computed again in the backward."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.utils.checkpoint.checkpoint(self.trunk, x, use_reentrant=False))


@case(
    LAZY,
    "sequence and image outputs",
    data=table(floats(2, 4, 4, count=6), labels(2, 4, 4, count=6), batch_size=3),
    call=lambda m, b: m.net(b[0]),
)
class LazyConvolutions(Task):
    """Lazy convolutions and BatchNorm, with a dummy pass in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(2, 1))
        self.net(torch.zeros(2, 2, 4, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])
