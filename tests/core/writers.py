"""Networks whose forwards write to more than their outputs, with what each one computes at its present state."""

import random

import numpy as np
import torch
from torch import nn

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(24).reshape(8, 3) % 10


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class MaxNorm(nn.Module):
    inputs = TOKENS

    def __init__(self):
        super().__init__()
        self.e, self.h = nn.Embedding(10, 5, max_norm=0.5), nn.Linear(5, 2)

    def forward(self, x):
        return self.h(self.e(x).mean(1).tanh())


class MaxNormBag(MaxNorm):
    def __init__(self):
        super().__init__()
        self.e = nn.EmbeddingBag(10, 5, max_norm=0.5, mode="sum")

    def forward(self, x):
        return self.h(self.e(x).tanh())


class WritesData(Base):
    """Halves a weight in each forward, without a trace in the counter of writes."""

    def forward(self, x):
        self.a.weight.data.mul_(0.5)
        return super().forward(x)


class CopiesData(Base):
    def forward(self, x):
        self.b.weight.data.copy_(self.b.weight.data.clamp(-0.1, 0.1))
        return super().forward(x)


class Clamps(Base):
    def forward(self, x):
        with torch.no_grad():
            self.a.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


class ThroughNumPy(Base):
    def forward(self, x):
        self.b.bias.detach().numpy()[...] += 1.0
        return super().forward(x)


class Sometimes(Base):
    """Writes for one of the samples only, which is not among the first that are tried."""

    def forward(self, x):
        if bool((x == X[5].to(x)).all(1).any()):
            self.a.weight.data.mul_(0.5)
            self.seen = True
        return super().forward(x)


class Attribute(Base):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(5)

    def forward(self, x):
        h = self.a(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.b(torch.tanh(h))


class InPlace(Attribute):
    def forward(self, x):
        h = self.a(x)
        self.mean.mul_(0.5).add_(h.detach().mean(0).to(self.mean))
        return self.b(torch.tanh(h))


class Buffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class Counter(Base):
    """What is computed depends on the number of calls; the present one is 3."""

    def __init__(self):
        super().__init__()
        self.calls = 3

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Collects(Base):
    def __init__(self):
        super().__init__()
        self.outputs, self.by_name, self.nested = [], {}, {"list": [[]]}

    def forward(self, x):
        h = torch.tanh(self.a(x))
        self.outputs.append(h)
        self.by_name["h"] = h
        self.nested["list"][0].append(len(x))
        return self.b(h)


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.h, self.state = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 2), None

    def forward(self, x):
        kept = self.state if self.state is not None and self.state.shape[1] == len(x) else None
        y, state = self.r(x.view(-1, 3, 2), kept)
        self.state = state.detach()
        return self.h(y[:, -1])


class Mean:
    """A metric that is no module."""

    def __init__(self):
        self.total, self.values = 0.0, []

    def update(self, value):
        self.total += float(value.detach().sum()) if value.ndim == 0 else 1.0
        self.values.append(value)


class Metric(nn.Module):
    def __init__(self):
        super().__init__()
        self.total, self.parts = torch.zeros(()), []

    def forward(self, value):
        self.total = self.total + value
        self.parts.append(value)
        return self.total


class Metrics(Base):
    def __init__(self):
        super().__init__()
        self.plain, self.module, self.groups = Mean(), Metric(), {"all": [Mean(), Metric()]}

    def forward(self, x):
        y = super().forward(x)
        self.plain.update(y.detach())
        self.module(y.detach().square().mean())
        for each in self.groups["all"]:
            (each.update if isinstance(each, Mean) else each)(y.detach().mean())
        return y


class Draws(Base):
    """Draws from every global generator, without effect in eval mode."""

    def __init__(self):
        super().__init__()
        self.own = torch.Generator().manual_seed(7)

    def forward(self, x):
        u = random.random() + np.random.rand() + float(torch.rand(())) + float(torch.rand((), generator=self.own))  # noqa: NPY002
        return super().forward(x) * (2 if self.training and u < 1 else 1)


class Lambda(Base):
    """A function among the attributes, and one in a list, hold the module."""

    def __init__(self):
        super().__init__()
        self.first = lambda x: torch.tanh(self.a(x))
        self.rest = [lambda h: self.b(h)]

    def forward(self, x):
        self.last = x
        return self.rest[0](self.first(x))


class InTuple(Base):
    """A copy would use the module itself, through a function in a tuple."""

    def __init__(self):
        super().__init__()
        self.layers = (lambda x: torch.tanh(self.a(x)), lambda h: self.b(h))
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        for layer in self.layers:
            x = layer(x)
        return x


class NoCopy:
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


class Uncopyable(Attribute):
    def __init__(self):
        super().__init__()
        self.handle, self.calls = NoCopy(), []

    def forward(self, x):
        self.calls.append(1)
        with torch.no_grad():
            self.b.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Grows(Base):
    """Makes an attribute and a submodule at its first call."""

    def forward(self, x):
        if not hasattr(self, "scale"):
            self.scale, self.extra = 2.0, nn.Identity()
        return super().forward(self.extra(x)) * self.scale


WRITERS = {
    each.__name__: each
    for each in (
        MaxNorm,
        MaxNormBag,
        WritesData,
        CopiesData,
        Clamps,
        ThroughNumPy,
        Attribute,
        InPlace,
        Buffer,
        Counter,
        Collects,
        Hidden,
        Metrics,
        Draws,
        Lambda,
        InTuple,
        Uncopyable,
        Grows,
    )
}
