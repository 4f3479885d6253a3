"""Losses of every make: modules, functions, weighted, penalised, with targets that are left out, of the user's own."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, labels, rows, table
from torch import Tensor, nn

from cases.batches import VALUE, X, Y, mlp


class Net(Task):
    """A small network whose subclasses bring a loss."""

    outputs = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])


def first(module: Any, batch: Any) -> Tensor:
    return module(batch[0])


@case("losses", data=table(X, Y), call=first)
class WeightedClasses(Net):
    """A module with weights of the classes and label smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)


@case("losses", data=table(X, torch.where(Y == 2, -100, Y)), call=first)
class Ignored(Net):
    """Targets of -100 are left out."""

    def criterion(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, ignore_index=-100)


@case("losses", data=table(X, labels(2, 3).float()), call=first)
class SeveralLabels(Net):
    """Binary cross-entropy over several labels, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.BCEWithLogitsLoss(reduction="sum")


@case("losses", data=table(X, VALUE), call=first)
class Penalised(Net):
    """Squared error with a penalty on the weights in the loss."""

    outputs = 1

    def criterion(self, out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y) + 1e-2 * sum(p.square().sum() for p in self.parameters())


@case("losses", "several calls", data=table(X, VALUE), call=first)
class GradientPenalty(Net):
    """A penalty on the gradient by the inputs: the loss is no function of the outputs."""

    outputs = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].detach().requires_grad_()
        out = self(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(out, batch[1]) + 0.1 * slope.square().sum(1).mean()


class Focal(nn.Module):
    """A loss of the user's own, as a module with a parameter that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(logits * self.log_scale.exp(), y, reduction="none")
        return ((1 - (-each).exp()).square() * each).mean()


@case("losses", data=table(X, Y), call=first)
class LearnedLoss(Net):
    """A loss module that has a trainable parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = Focal()


@case("losses", data=table(X, floats(2, seed=18)), call=first)
class GaussianLikelihood(Net):
    """Mean and variance of two targets: four outputs, one loss."""

    outputs = 4

    def criterion(self, out: Tensor, y: Tensor) -> Tensor:
        mean, raw = out.chunk(2, 1)
        return F.gaussian_nll_loss(mean, y, F.softplus(raw) + 1e-3)


@case("losses", "squeezed outputs", data=table(X, (VALUE > 0).float()), call=first)
class Probability(Net):
    """The forward ends in a sigmoid, with nn.BCELoss."""

    outputs = 1

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.BCELoss()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.net(x))


@case("losses", "dict batches", "several calls", data=rows(x=X, y=Y), call=lambda m, b: m(b["x"]))
class Distilled(Net):
    """A frozen teacher is called in the same step."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = mlp().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["x"])
        with torch.no_grad():
            taught = self.teacher(batch["x"]).softmax(1)
        return F.cross_entropy(logits, batch["y"]) + F.kl_div(logits.log_softmax(1), taught, reduction="batchmean")
