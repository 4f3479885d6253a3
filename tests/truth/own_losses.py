"""Modules whose losses are none of torch's usual ones, shared by the tests of the loss and of its kernel."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F

N, T, V = 12, 5, 7


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(*shape, high=V, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class Base(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.build()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Mlp(Base):
    """Classes of vectors; the formula of the loss is that of the subclass."""

    def build(self):
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        return self.of(self.net(batch[0]), batch)

    def samples(self):
        return list(zip(drawn(N, 4), words(N, high=3), drawn(N, 3, seed=3), strict=True))

    def outputs(self, batch):
        return self.net(batch[0])


class Focal(Mlp):
    def of(self, u, batch):
        each = F.cross_entropy(u, batch[1], reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


class BatchNormed(Focal):
    def build(self):
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


class TwoTerms(Mlp):
    def of(self, u, batch):
        return F.cross_entropy(u, batch[1]) + 0.1 * (u - batch[2]).abs().sum(1).mean()


class Gaussian(Mlp):
    def of(self, u, batch):
        return F.gaussian_nll_loss(u[:, 0], batch[2][:, 0], F.softplus(u[:, 1]) + 1e-3) + 0 * u[:, 2].sum()


class SummedQuantile(Mlp):
    def of(self, u, batch):
        error = batch[2] - u
        return torch.maximum(0.9 * error, -0.1 * error).sum()


class Smoothed(Mlp):
    def of(self, u, batch):
        return F.cross_entropy(u, batch[1], label_smoothing=0.13)


class Language(Base):
    """One distribution over V words at each of T positions."""

    def build(self):
        self.table, self.head = nn.Embedding(V, 6), nn.Linear(6, V)
        self.rnn = nn.GRU(6, 6, batch_first=True)

    def forward(self, tokens):
        return self.head(self.rnn(self.table(tokens))[0])

    def training_step(self, batch, batch_idx):
        return self.of(self(batch[0][:, :-1]), batch)

    def samples(self):
        return [(each,) for each in words(N, T + 1)]

    def outputs(self, batch):
        return self(batch[0][:, :-1])


class Masked(Language):
    """A mean over the tokens that a mask names."""

    def samples(self):
        lengths = torch.arange(N) % (T - 1) + 2
        return list(zip(words(N, T + 1), (torch.arange(T) < lengths[:, None]).float(), strict=True))

    def of(self, u, batch):
        each = F.cross_entropy(u.transpose(1, 2), batch[0][:, 1:], reduction="none")
        return (each * batch[1]).sum() / batch[1].sum()


class Discounted(Language):
    def of(self, u, batch):
        each = F.cross_entropy(u.transpose(1, 2), batch[0][:, 1:], reduction="none")
        return (each * 0.9 ** torch.arange(T)).mean()


class Pieces(Base):
    """A dict of boxes and classes, with a loss for each."""

    def build(self):
        self.body, self.classes, self.boxes = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x):
        h = self.body(x).tanh()
        return {"logits": self.classes(h), "boxes": self.boxes(h)}

    def training_step(self, batch, batch_idx):
        made = self(batch["image"])
        return F.cross_entropy(made["logits"], batch["label"]) + 5 * F.smooth_l1_loss(made["boxes"], batch["box"])

    def of(self, u, batch):
        return F.cross_entropy(u[:, :3], batch["label"]) + 5 * F.smooth_l1_loss(u[:, 3:], batch["box"])

    def samples(self):
        rows = zip(drawn(N, 4), words(N, high=3), drawn(N, 4, seed=5), strict=True)
        return [{"image": x, "label": y, "box": b} for x, y, b in rows]

    def outputs(self, batch):
        made = self(batch["image"])
        return torch.cat([made["logits"], made["boxes"]], 1)


class Siamese(Base):
    """Two calls of one network, whose results meet in the loss."""

    def build(self):
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - self.net(batch[1])).square().sum(1).mean()

    def of(self, u, batch):
        return (u[:, :2] - u[:, 2:]).square().sum(1).mean()

    def samples(self):
        return list(zip(drawn(N, 4), drawn(N, 4, seed=6), strict=True))

    def outputs(self, batch):
        return torch.cat([self.net(batch[0]), self.net(batch[1])], 1)


class Inside(Focal):
    """The loss is computed where the outputs are: an object holds both."""

    def forward(self, batch):
        logits = self.net(batch[0])
        return SimpleNamespace(loss=self.of(logits, batch), logits=logits)

    def training_step(self, batch, batch_idx):
        return {"loss": self(batch).loss}


class ByHand(Focal):
    """Manual optimization with one loss."""

    def build(self):
        super().build()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def collated(module):
    return torch.utils.data.default_collate(module.samples())


class Contrastive(Mlp):
    def of(self, u, batch):
        z = F.normalize(u)
        return F.cross_entropy(z @ z.T / 0.2, torch.arange(len(z)).roll(1))


class LaterUsual(Mlp):
    def of(self, u, batch):
        return (1 if self.global_step < 5 else 0.5) * F.cross_entropy(u, batch[1])
