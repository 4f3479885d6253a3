"""The kernel is that of the call that the training step makes: against a double loop over the call, written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_conv.callbacks import KernelStability

N = 6


def double_loop(outputs, parameters):
    """Return sum_c <grad u_ic, grad u_jc>, one output at a time."""
    rows = []
    for row in outputs.flatten(1):
        grads = [torch.autograd.grad(u, parameters, retain_graph=True, allow_unused=True) for u in row]
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).flatten()
                            for g, p in zip(each, parameters, strict=False)
                        ]
                    )
                    for each in grads
                ]
            )
        )
    jacobian = torch.stack(rows)
    return torch.einsum("icp,jcp->ij", jacobian, jacobian)


class Base(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.make()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Samples(Dataset):
    def __init__(self, sample):
        torch.manual_seed(2)
        self.samples = [sample(i) for i in range(N)]

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.samples[i]


class Keywords(Base):
    sample = staticmethod(
        lambda i: {"tokens": torch.randint(9, (4,)), "mask": torch.arange(4) <= i % 4, "y": torch.zeros(1)}
    )

    def make(self):
        self.e, self.h = nn.Embedding(9, 5), nn.Linear(5, 1)

    def forward(self, *, tokens, mask=None):
        weight = mask[..., None].to(self.h.weight.dtype)
        return self.h((self.e(tokens) * weight).sum(1) / weight.sum(1))

    def training_step(self, batch, _):
        return F.mse_loss(self(tokens=batch["tokens"], mask=batch["mask"]), batch["y"])

    def call(self, batch):
        return self(tokens=batch["tokens"], mask=batch["mask"])


class TargetFirst(Base):
    sample = staticmethod(lambda i: (torch.zeros(2), torch.randn(3)))

    def make(self):
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def training_step(self, batch):
        y, x = batch
        return F.smooth_l1_loss(self.net(x), y)

    def call(self, batch):
        return self.net(batch[1])


class WholeBatch(Keywords):
    def forward(self, batch):
        return Keywords.forward(self, tokens=batch["tokens"], mask=batch["mask"])

    def training_step(self, batch, _):
        return F.mse_loss(self(batch), batch["y"])

    def call(self, batch):
        return self(batch)


class Autoencoder(Base):
    """Its ``forward`` is the encoder."""

    sample = staticmethod(lambda i: torch.randn(4))

    def make(self):
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, _):
        return F.mse_loss(self.decoder(torch.tanh(self.encoder(batch))), batch)

    def call(self, batch):
        return self.decoder(torch.tanh(self.encoder(batch)))


class WithLoss(Base):
    sample = staticmethod(lambda i: {"x": torch.randn(3), "labels": torch.randint(2, (1,))[0]})

    def make(self):
        self.net = nn.Linear(3, 2)

    def forward(self, x, labels=None):
        logits = self.net(x)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)

    def training_step(self, batch, _):
        return self(**batch).loss

    def call(self, batch):
        return self.net(batch["x"])


class Siamese(Base):
    """Two calls of one module; all outputs that the loss depends on count."""

    sample = staticmethod(lambda i: (torch.randn(3), torch.randn(3)))

    def make(self):
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def training_step(self, batch, _):
        return (self.net(batch[0]) - self.net(batch[1])).square().mean()

    def call(self, batch):
        return torch.cat([self.net(batch[0]), self.net(batch[1])], 1)


class Sequence(Base):
    """Predicts the next token: the call has one position less than the batch."""

    sample = staticmethod(lambda i: torch.randint(7, (5,)))

    def make(self):
        self.e, self.r, self.h = nn.Embedding(7, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.h(self.r(self.e(tokens))[0])

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def call(self, batch):
        return self(batch[:, :-1])


class TimeFirst(Base):
    """Samples are the second axis of what enters and leaves the module."""

    sample = staticmethod(lambda i: (torch.randn(4, 3), torch.zeros(4, 2)))

    def make(self):
        self.r, self.h = nn.GRU(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.h(self.r(x)[0])

    def training_step(self, batch, _):
        return F.mse_loss(self(batch[0].transpose(0, 1)), batch[1].transpose(0, 1))

    def call(self, batch):
        return self(batch[0].transpose(0, 1)).transpose(0, 1)


class Images(Base):
    sample = staticmethod(lambda i: (torch.randn(2, 4, 4), torch.randint(3, (4, 4))))

    def make(self):
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def call(self, batch):
        return self.net(batch[0])


@dataclass
class Example:
    x: torch.Tensor
    y: torch.Tensor


class Dataclasses(TargetFirst):
    sample = staticmethod(lambda i: (torch.randn(3), torch.zeros(2)))

    def training_step(self, batch, _):
        return F.mse_loss(self.net(batch.x), batch.y)

    def call(self, batch):
        return self.net(batch.x)

    @staticmethod
    def collate(samples):
        return Example(*(torch.stack(each) for each in zip(*samples, strict=True)))


class Manual(TargetFirst):
    def make(self):
        super().make()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.mse_loss(self.net(batch[1]), batch[0]))
        optimizer.step()


class TwoHeads(Base):
    sample = staticmethod(lambda i: {"x": torch.randn(3), "a": torch.zeros(2), "b": torch.zeros(1)})

    def make(self):
        self.trunk, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def training_step(self, batch, _):
        h = torch.tanh(self.trunk(batch["x"]))
        return F.mse_loss(self.a(h), batch["a"]) + F.l1_loss(self.b(h), batch["b"])

    def call(self, batch):
        h = torch.tanh(self.trunk(batch["x"]))
        return torch.cat([self.a(h), self.b(h)], 1)


MODULES = [
    Keywords, TargetFirst, WholeBatch, Autoencoder, WithLoss, Siamese, Sequence, TimeFirst, Images, Dataclasses, Manual, TwoHeads,
]  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_the_kernel_is_that_of_the_call_that_the_step_makes(make_trainer, kind):
    loader = DataLoader(Samples(kind.sample), batch_size=3, collate_fn=getattr(kind, "collate", None))
    monitor, module = KernelStability(every_n_steps=1), kind()
    make_trainer([monitor], max_epochs=1).fit(module, loader)
    everything = loader.collate_fn([loader.dataset[i] for i in range(N)])
    expected = double_loop(module.call(everything), list(module.parameters()))
    found = monitor.state_dict()["reference"]["matrix"]
    assert torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


class VAE(Base):
    sample = staticmethod(lambda i: torch.randn(4))

    def make(self):
        self.e, self.d = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        mean, log_var = self.e(x).chunk(2, 1)
        return self.d(mean + torch.randn_like(mean) * (0.5 * log_var).exp()), mean, log_var

    def training_step(self, batch, _):
        x, mean, log_var = self(batch)
        return F.mse_loss(x, batch) + 1e-3 * (mean.square() + log_var.exp() - log_var).mean()


def test_random_numbers_of_a_network_are_held_sample_by_sample(make_trainer):
    monitor, module = KernelStability(every_n_steps=1), VAE()
    make_trainer([monitor], max_epochs=1).fit(module, DataLoader(Samples(VAE.sample), batch_size=3))
    stored = monitor.state_dict()["inputs"]
    x, noise = stored["batch"], stored["draw 0"]
    mean, log_var = module.e(x).chunk(2, 1)
    u = torch.cat([module.d(mean + noise * (0.5 * log_var).exp()), mean, log_var], 1)
    expected = double_loop(u, list(module.parameters()))
    found = monitor.state_dict()["reference"]["matrix"]
    assert torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Siamese, "self.net(...) (2 calls) as the training step calls it"),
        (TwoHeads, "self.a(...) and self.b(...) as the training step calls them"),
        (Autoencoder, "self.decoder(...) as the training step calls it"),
        (WithLoss, "self(...) as the training step calls it"),
    ],
)
def test_what_was_observed_is_said(make_trainer, kind, words):
    monitor = KernelStability(every_n_steps=1)
    make_trainer([monitor], max_epochs=1).fit(kind(), DataLoader(Samples(kind.sample), batch_size=3))
    assert monitor.measured.startswith(f"the network is {words} (observed); ")


def test_another_fit_that_is_not_measured_says_nothing_of_the_last_one(make_trainer):
    monitor, data = (
        KernelStability(every_n_steps=1, on_error="warn"),
        DataLoader(Samples(Autoencoder.sample), batch_size=3),
    )
    make_trainer([monitor], max_epochs=1).fit(Autoencoder(), data)

    class Silent(Autoencoder):
        def training_step(self, batch, _):
            return None

    with pytest.warns(UserWarning, match="Nothing is measured"):
        make_trainer([monitor], max_epochs=1).fit(Silent(), data)
    assert monitor.measured == ""
