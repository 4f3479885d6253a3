"""LightningModules that call their network in every way, over one table: 20 samples, a trunk of width 64, a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

N, INPUTS, WIDTH = 20, 8, 64
_GENERATOR = torch.Generator().manual_seed(1)
X = torch.rand(N, INPUTS, generator=_GENERATOR)
Y = torch.rand(N, 1, generator=_GENERATOR)
MASK = (torch.rand(N, INPUTS, generator=_GENERATOR) > 0.3).float()
TOKENS = torch.randint(0, 30, (N, 4), generator=_GENERATOR)
LABELS = torch.randint(0, 5, (N, 4), generator=_GENERATOR)


class Base(LightningModule):
    """Trunk and head, called by a forward of one argument; a loss that is a function."""

    def __init__(self, inputs: int = INPUTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Bare(Base):
    """Without a forward of its own."""

    forward = LightningModule.forward


@dataclass(frozen=True)
class Way:
    """A way to call the network, with the features that enter the head, written by hand."""

    name: str
    module: Callable[[], LightningModule]
    loader: Callable[[], Any]
    features: Callable[[Any], Tensor]
    loss: str = "MSELoss (observed)"


WAYS: list[Way] = []


def plain(module: Any) -> Tensor:
    return module.trunk(X.to(next(module.parameters())))


def way(loader: Callable[[], Any], features: Callable[[Any], Tensor] = plain, **rest: Any) -> Any:
    def register(module: Any) -> Any:
        WAYS.append(Way(module.__name__, module, loader, features, **rest))
        return module

    return register


def table(*tensors: Tensor, batch_size: int = 5, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(TensorDataset(*(tensors or (X, Y))), batch_size=batch_size, **options)


def rows(make: Callable[..., Any], *tensors: Tensor, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader([make(*row) for row in zip(*tensors, strict=True)], batch_size=5, **options)


@way(table(Y, X))
class TargetFirst(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[1]), batch[0])


@way(rows(lambda x, y: {"answer": y, "views": {"left": x}}, X, Y))
class Nested(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch["views"]["left"]), batch["answer"])


@way(rows(lambda x, m, y: {"q": x, "mask": m, "labels": y}, X, MASK, Y), lambda module: module.trunk(X * MASK))
class KeywordOnly(Base):
    def forward(self, *, q: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        u = self.head(self.trunk(q if mask is None else q * mask))
        return SimpleNamespace(loss=None if labels is None else F.mse_loss(u, labels), logits=u)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch).loss


@way(rows(lambda x, m, y: {"x": x, "m": m, "y": y}, X, MASK, Y), lambda module: module.trunk(X * MASK))
class WholeBatch(Base):
    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch["x"] * batch["m"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch), batch["y"])


class Pair(NamedTuple):
    target: Tensor
    image: Tensor


@way(rows(lambda x, y: Pair(y, x), X, Y))
class Named(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch.image), batch.target)


@dataclass
class Record:
    target: Tensor
    image: Tensor

    @staticmethod
    def collate(samples: list[Any]) -> Record:
        return Record(torch.stack([y for _, y in samples]), torch.stack([x for x, _ in samples]))


@way(table(X, Y, collate_fn=Record.collate))
class Dataclass(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert dataclasses.is_dataclass(batch)
        return F.mse_loss(self(x=batch.image), batch.target)


@way(table())
class Parts(Bare):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.head(self.trunk(batch[0])), batch[1])


@way(rows(lambda x, y: {"a": y, "b": x}, X, Y))
class PartsOfADict(Bare):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("ahead", batch["b"].mean())
        return F.mse_loss(self.head(self.trunk(batch["b"])), batch["a"])


@way(rows(lambda x, y: Pair(y, x), X, Y))
class PartsOfANamedTuple(Bare):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        target, image = batch
        return F.mse_loss(self.head(self.trunk(image.to(self.dtype))), target)


@way(table(), lambda module: module.net[:-1](X))
class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        base = Base()
        self.net = nn.Sequential(*base.trunk, base.head)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    configure_optimizers = Base.configure_optimizers


@way(table(torch.cat([X, Y], 1)), lambda module: module.trunk(2 * X - 1), loss="unknown")
class Sliced(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(2 * batch[0][:, :-1] - 1), batch[0][:, -1:])


@way(table(X, Y), lambda module: module.trunk(X), loss="unknown")
class OwnLoss(Base):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).abs().pow(1.5).mean()


@way(table(Y[:, 0], X))
class Squeezed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[1]), batch[0])


@way(table())
class AskedForItsType(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dtype))


@way(table())
class ScriptedTrunk(Base):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.jit.script(self.trunk)


@way(table())
class TracedTrunk(Base):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.jit.trace(self.trunk, torch.rand(2, INPUTS))


@way(table())
class ScriptedTrunkInParts(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.jit.script(self.trunk)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.head(self.trunk(batch[0])), batch[1])


@way(table())
class CompiledTrunk(Base):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.compile(self.trunk, backend="eager")


@way(table())
class DataParallelTrunk(Base):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.DataParallel(self.trunk)


@way(table())
class FrozenPart(Base):
    def __init__(self) -> None:
        super().__init__()
        self.trunk[0].requires_grad_(False)


@way(table(TOKENS, Y), lambda module: module.trunk(module.table(TOKENS).flatten(1)))
class MaxNorm(Base):
    def __init__(self) -> None:
        super().__init__(32)
        self.table = nn.Embedding(30, 8, max_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.table(x).flatten(1))


class Tokens(LightningModule):
    """A head on each of 4 tokens, which are mixed before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(30, 8), nn.Linear(32, 96)
        self.body, self.head = nn.Sequential(nn.Tanh(), nn.Linear(24, 96), nn.Tanh()), nn.Linear(96, 5)

    def trunk(self, x: Tensor) -> Tensor:
        return self.body(self.mix(self.table(x).flatten(1)).reshape(len(x), 4, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    configure_optimizers = Base.configure_optimizers


def of_tokens(module: Any) -> Tensor:
    return module.trunk(TOKENS).flatten(0, 1)


way(table(TOKENS, LABELS), of_tokens, loss="unknown")(Tokens)


@way(table(TOKENS, LABELS), of_tokens, loss="unknown")
class FlatTokens(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).flatten(0, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1].flatten())


@way(table(TOKENS, LABELS), of_tokens, loss="unknown")
class TokensInParts(Tokens):
    forward = LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.trunk(batch[0])).movedim(-1, 1), batch[1])


@way(table(TOKENS, torch.where(torch.arange(4) < 2, LABELS, -100)), of_tokens, loss="unknown")
class MaskedTokens(Tokens):
    """The last two tokens of each sample are left out of the loss."""


@way(
    table(torch.stack([X, X.flip(0) + 1], 1), Y),
    lambda module: module.trunk(torch.stack([X, X.flip(0) + 1], 1)).flatten(0, 1),
    loss="unknown",
)
class Siamese(Base):
    """Both sides in one call, as the refusal of two calls says."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]).sum(1), batch[1])


@way(table())
class LogsInForward(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.log("seen", x.mean())
        return super().forward(x)


@way(table())
class CountsCalls(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


@way(table(), lambda module: module.trunk(X) * module.scale)
class ChangesItsScale(Base):
    """A plain attribute that the forward reads and the run changes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x) * self.scale)

    def on_train_epoch_end(self) -> None:
        self.scale = 0.5
