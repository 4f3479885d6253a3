"""Batches that are not ``(x, y)``: dicts, nested structures, dataclasses, targets first, the batch itself as the argument."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, labels, rows, table
from torch import Tensor, nn

X, Y = floats(6), labels(3)
VALUE = floats(1, seed=4)


def mlp(inputs: int = 6, outputs: int = 3, width: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


@case("dict batches", data=rows(x=X, y=Y), call=lambda m, b: m(b["x"]))
class DictBatch(Task):
    """Classification on batches {"x": ..., "y": ...}."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])


@case("dict batches", data=rows(age=X, visits=floats(4, seed=5), y=VALUE), call=lambda m, b: m(b["age"], b["visits"]))
class DictOfTwoTables(Task):
    """Regression on two named inputs with unusual keys."""

    def __init__(self) -> None:
        super().__init__()
        self.age, self.visits, self.head = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, age: Tensor, visits: Tensor) -> Tensor:
        return self.head(torch.tanh(self.age(age) + self.visits(visits)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch["age"], batch["visits"]), batch["y"])


@case(
    "dict batches",
    "nested batches",
    data=rows(inputs=[{"left": x, "right": z} for x, z in zip(X, floats(6, seed=6), strict=True)], y=VALUE),
    call=lambda m, b: m(b["inputs"]),
)
class DictInDict(Task):
    """A dict of inputs within a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(12, 1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.net(torch.cat([inputs["left"], inputs["right"]], 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.smooth_l1_loss(self(batch["inputs"]), batch["y"])


class Point(NamedTuple):
    """A sample by name."""

    x: Tensor
    weight: Tensor
    y: Tensor


@case(
    "nested batches",
    "losses",
    data=rows(x=X, weight=floats(seed=7).abs(), y=Y, build=lambda row: Point(**row)),
    call=lambda m, b: m.net(b.x),
)
class NamedTupleBatch(Task):
    """A namedtuple with weights of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Point, batch_idx: int) -> Tensor:
        return (batch.weight * F.cross_entropy(self.net(batch.x), batch.y, reduction="none")).mean()


@dataclass
class Scene:
    """A batch as a dataclass."""

    image: Tensor
    label: Tensor


def scene(samples: list[dict[str, Tensor]]) -> Scene:
    return Scene(torch.stack([s["image"] for s in samples]), torch.stack([s["label"] for s in samples]))


@case("nested batches", data=rows(image=floats(1, 6, 6), label=Y, collate=scene), call=lambda m, b: m(b.image))
class DataclassBatch(Task):
    """A dataclass made by the collate function."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: Scene, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch.image), batch.label)


@case(
    "nested batches",
    data=rows(x=X, z=floats(4, seed=5), y=VALUE, build=lambda r: ((r["x"], r["z"]), r["y"])),
    call=lambda m, b: m(*b[0]),
)
class TupleInTuple(Task):
    """((x, z), y): two inputs in a tuple of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(6, 4, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.head(self.mix(x, z).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, z), y = batch
        return F.mse_loss(self(x, z), y)


@case("target first", data=table(VALUE, X), call=lambda m, b: m(b[1]))
class TargetFirst(Task):
    """(y, x), where y would not fit into the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss_fn = mlp(6, 1), nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y, x = batch
        return self.loss_fn(self(x), y)


@case("target first", data=table(floats(6, seed=8), X), call=lambda m, b: m(b[1]))
class TargetOfTheSameShape(Task):
    """(y, x), where y would fit into the network: a guess measures the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.l1_loss(self(batch[1]), batch[0])


@case("target first", "nested batches", data=table(torch.arange(12), X, Y), call=lambda m, b: m(b[1]))
class NumberFirst(Task):
    """(index, x, y), as data sets that return the number of the sample do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, x, y = batch
        return F.cross_entropy(self(x), y)


@case("forward(batch)", "dict batches", data=rows(x=X, y=Y), call=lambda m, b: m(b))
class ForwardTakesTheDict(Task):
    """forward(batch) on a dict, and the step calls self(batch)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch["x"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["y"])


@case("forward(batch)", data=table(X, VALUE), call=lambda m, b: m(b))
class ForwardTakesTheTuple(Task):
    """forward(batch) on a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 1)

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch), batch[1])


@case("forward(batch)", "output objects", "dict batches", data=rows(x=X, y=Y), call=lambda m, b: m(b)["logits"])
class ForwardReturnsADict(Task):
    """forward(batch) computes the loss, too, and returns {"loss": ..., "logits": ...}."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, batch: Any) -> dict[str, Tensor]:
        logits = self.net(batch["x"])
        return {"loss": F.cross_entropy(logits, batch["y"]), "logits": logits}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch)["loss"]
