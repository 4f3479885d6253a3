"""Forwards and steps that write: metrics, logged values, counters, hidden states, weights, hooks of the user's."""

from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics
from case import Task, case
from samples import floats, table
from torch import Tensor, nn

from cases.batches import VALUE, X, Y, mlp

WRITES = "side effects of a forward"


class Net(Task):
    """Classification whose subclasses do something on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def first(module: Any, batch: Any) -> Tensor:
    return module.net(batch[0])


@case(WRITES, data=table(X, Y), call=first)
class MetricInForward(Net):
    """A nested torchmetrics metric is updated in the forward and logged at the epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.ModuleDict(
            {"size": torchmetrics.MeanMetric(), "accuracy": torchmetrics.Accuracy("multiclass", num_classes=3)}
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.kept["size"].update(out.detach().square().mean())
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self(batch[0])
        self.kept["accuracy"](out, batch[1])
        self.log_dict({name: metric for name, metric in self.kept.items()}, on_epoch=True, on_step=False)
        return F.cross_entropy(out, batch[1])


@case(WRITES, data=table(X, Y), call=first)
class LogInForward(Net):
    """self.log in the forward, per step and per epoch."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.log("size", out.square().mean(), on_epoch=True, on_step=True)
        return out


@case(WRITES, data=table(X, Y), call=first)
class Counters(Net):
    """Numbers, a deque, a dict and a tensor among the attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.recent, self.seen, self.mean = 0, deque(maxlen=3), {"samples": 0}, torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        self.calls += 1
        self.recent.append(float(out.detach().mean()))
        self.seen["samples"] += len(x)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out


@case(WRITES, data=table(X, Y), call=first)
class UserHooks(Net):
    """Forward hooks of the user's that look, and one that scales the output."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[float] = []
        self.net[0].register_forward_hook(lambda module, args, out: self.sizes.append(float(out.detach().norm())))
        self.net[1].register_forward_hook(lambda module, args, out: 2 * out)


@case(WRITES, data=table(X, VALUE), call=lambda m, b: m(b[0]))
class WritesItsWeights(Task):
    """A forward that normalises its weight through .data."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 8, bias=False), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.trunk.weight.data.copy_(F.normalize(self.trunk.weight.data, dim=1))
        return self.head(self.trunk(x).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


@case(
    WRITES,
    "recurrent",
    data=table(floats(6), Y, shuffle=False),
    call=lambda m, b: m(b[0]),
    expected="needs one argument",
)
class HiddenState(Task):
    """A recurrent state carried from batch to batch; the batch of the probe begins with none."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head, self.state = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3), None

    def forward(self, x: Tensor) -> Tensor:
        kept = self.state if self.state is not None and self.state.shape[1] == len(x) else None
        out, state = self.rnn(x.view(len(x), 3, 2), kept)
        self.state = state.detach()
        return self.head(out[:, -1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@case(WRITES, "losses", data=table(X, Y), call=first)
class CentersOfClasses(Net):
    """Buffers that the step updates: moving centers, which the loss compares with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(3, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self(batch[0])
        own = F.one_hot(batch[1], 3).to(out)
        with torch.no_grad():
            self.centers.mul_(0.9).add_(0.1 * own.T @ out / own.sum(0).clamp(min=1)[:, None])
        return F.cross_entropy(out, batch[1]) + 0.1 * (out - self.centers[batch[1]]).square().mean()


@case(WRITES, data=table(X, Y), call=first)
class StepCounter(Net):
    """The loss depends on how often the step was called, and on the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return min(1.0, 0.2 * self.steps + 0.1 * self.current_epoch) * F.cross_entropy(self(batch[0]), batch[1])
