"""A run ends bit for bit as it does without monitors, whatever the module, its hooks and its data do."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria, KernelStability, LambdaMin


class Module(pl.LightningModule):
    def __init__(self, net=None):
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
        self.loss_fn, self.losses = nn.CrossEntropyLoss(), []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        loss = self.loss_fn(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Renormalised(nn.Module):
    """Writes its weight in the forward, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.e, self.h = nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 2)

    def forward(self, x):
        return self.h(self.e((x.abs() * 3).long() % 10).mean(1))


class Clamped(nn.Module):
    """Writes through ``.data``, which no version counts."""

    def __init__(self):
        super().__init__()
        self.a, self.h = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        self.a.weight.data.mul_(0.9)
        return self.h(torch.tanh(self.a(x)))


class Attributes(nn.Module):
    """A running mean, a counter and a list as plain attributes."""

    def __init__(self):
        super().__init__()
        self.a, self.h, self.mean, self.calls, self.seen = nn.Linear(6, 8), nn.Linear(8, 2), torch.zeros(8), 0, []

    def forward(self, x):
        h = self.a(x)
        y = self.h(torch.tanh(h - self.mean) / (1 + self.calls))
        if self.training:
            self.mean, self.calls = 0.9 * self.mean + 0.1 * h.detach().mean(0), self.calls + 1
        self.seen.append(float(x.detach().mean()) if not torch._C._functorch.maybe_get_bdim(x) >= 0 else 0.0)
        return y


class Chance(nn.Module):
    def __init__(self, draw=random.random):
        super().__init__()
        self.n, self.draw = nn.Linear(6, 2), draw

    def forward(self, x):
        u = self.draw()
        return self.n(x) * (2 if self.training and u < 0.2 else 1)


class WithMetric(Module):
    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()

    def forward(self, x):
        y = self.net(x)
        self.mean.update(y.detach().square().mean())
        self.log("out", y.square().mean(), on_epoch=True, on_step=True)
        return y

    def on_train_epoch_end(self):
        self.losses.append(float(self.mean.compute()))


COUNT = []


class Collector:
    def __init__(self):
        self.norms = []

    def keep(self, module, args, output):
        self.norms.append(float(output.detach().norm()))


class Hooked(Module):
    def __init__(self):
        super().__init__()
        COUNT.clear()
        inside, self.collector = [], Collector()
        self.net[0].register_forward_hook(lambda *_: inside.append(1))
        self.net[0].register_forward_pre_hook(lambda *_: COUNT.append(1))
        self.net[2].register_forward_hook(self.collector.keep)
        self.counts = lambda: (len(inside), len(COUNT), len(self.collector.norms))

    def on_train_end(self):
        self.losses.append(self.counts())


class Augmented(Dataset):
    """Draws from generators of its own, and from those of the process."""

    def __init__(self):
        self.own, self.rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
        self.more = {"python": random.Random(3)}

    def __len__(self):
        return 24

    def __getitem__(self, i):
        noise = torch.randn(6, generator=self.own) + float(self.rng.normal()) + self.more["python"].random()
        return noise + random.random() + float(np.random.rand()), i % 2  # noqa: NPY002


def mixing():
    generator = torch.Generator().manual_seed(4)

    def collate(samples):
        x, y = zip(*samples, strict=True)
        return torch.stack(x) * (0.5 + torch.rand(len(x), 1, generator=generator)), torch.tensor(y)

    return collate


X = torch.randn(24, 6, generator=torch.Generator().manual_seed(5))
PLAIN = TensorDataset(X, torch.arange(24) % 2)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: Module(Renormalised()), PLAIN),
        (lambda: Module(Clamped()), PLAIN),
        (lambda: Module(Attributes()), PLAIN),
        (lambda: Module(Chance()), PLAIN),
        (lambda: Module(Chance(np.random.rand)), PLAIN),
        (WithMetric, PLAIN),
        (Hooked, PLAIN),
        (Module, Augmented),
    ],
    ids=["max_norm", "data", "attributes", "random", "numpy", "metric and log", "hooks", "generators of the data"],
)
def test_the_run_is_bit_for_bit_the_same(make_trainer, make, data):
    def run(callbacks):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        module, samples = make(), data() if isinstance(data, type) else data
        loader = DataLoader(
            samples, batch_size=4, shuffle=True, collate_fn=mixing() if isinstance(data, type) else None
        )
        trainer = make_trainer(callbacks, max_epochs=2)
        trainer.fit(module, loader)
        optimizer = trainer.optimizers[0].state_dict()["state"]
        generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        momenta = [each["momentum_buffer"] for each in optimizer.values()]
        return module, [*module.state_dict().values(), *momenta, generators[0]], generators[1:]

    monitors = [KernelStability(8, 1), LambdaMin(8, 1), ConvergenceCriteria(probe=8, every_n_steps=1)]
    (plain, tensors, rest), (watched, others, others_rest) = run([]), run(monitors)
    assert plain.losses == watched.losses
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    assert rest == others_rest
    for a, b in zip(plain.net.modules(), watched.net.modules(), strict=True):
        for name in ("mean", "calls", "seen"):
            if hasattr(a, name):
                x, y = getattr(a, name), getattr(b, name)
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_logger_that_fails_from_the_first_measurement_on_ends_no_run(lenient, make_trainer, recorder):
    def broken(*args, **kwargs):
        raise ConnectionError("503")

    recorder.log_metrics = broken
    with pytest.warns(UserWarning, match="503"):
        make_trainer([KernelStability(8, 1)], max_epochs=1, logger=recorder).fit(
            Module(), DataLoader(PLAIN, batch_size=4)
        )
