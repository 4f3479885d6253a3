"""Plain linear heads with plain losses: these must be certified wherever the rank is clearly n and nothing limits it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from adversary import Case, Kind
from judge import judge
from runs import Run, plain, trunk
from torch import nn


def clipped(case: Case) -> Run:
    return plain(case, trainer={"gradient_clip_val": 0.1})


def clipped_by_value(case: Case) -> Run:
    return plain(case, trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"})


def accumulated(case: Case) -> Run:
    return plain(case, trainer={"accumulate_grad_batches": 2}, epochs=4)


def momentum(case: Case) -> Run:
    run = plain(case)
    run.module.optimizer = {"lr": 0.05, "momentum": 0.9}
    return run


def adam(case: Case) -> Run:
    run = plain(case)
    run.module.configure_optimizers = lambda: torch.optim.Adam(run.module.parameters(), lr=1e-3)
    return run


def decay_on_the_trunk(case: Case) -> Run:
    run = plain(case)
    run.module.configure_optimizers = lambda: torch.optim.SGD(
        [{"params": run.module.trunk.parameters(), "weight_decay": 0.01}, {"params": run.module.head.parameters()}],
        lr=0.01,
    )
    return run


def scheduled(case: Case) -> Run:
    run = plain(case)

    def configure():
        optimizer = torch.optim.SGD(run.module.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    run.module.configure_optimizers = configure
    return run


def by(make: Callable[[int], nn.Module]) -> Callable[[Case], Run]:
    return lambda case: plain(case, trunk(case, make(case.n + case.spare)))


def logged(case: Case) -> Run:
    run = plain(case)
    step = run.module._step

    def with_log(net, batch):
        loss = step(net, batch)
        net.log("loss", loss)
        net.log("largest", batch[0].abs().max())
        return {"loss": loss, "inputs": batch[0]}

    run.module._step = with_log
    return run


def without_bias(case: Case) -> Run:
    return plain(case, head=nn.Linear(case.n + case.spare, case.classes, bias=False))


def two_hidden(case: Case) -> Run:
    width = case.n + case.spare
    return plain(case, nn.Sequential(nn.Linear(case.inputs, 16), nn.Tanh(), nn.Linear(16, width), nn.GELU()))


def equal_pair(case: Case) -> Run:
    run = plain(case)
    run.x[1], run.y[1] = run.x[0], run.y[0]  # rank n - 1, and the infimum is reached all the same
    return run


def cached(case: Case) -> Run:
    return plain(case, guard={"cache_features": True})


VARIANTS: dict[str, Callable[[Case], Run]] = {
    "plain": plain,
    "clipped": clipped,
    "clipped by value": clipped_by_value,
    "accumulated": accumulated,
    "momentum": momentum,
    "Adam": adam,
    "weight decay on the trunk alone": decay_on_the_trunk,
    "scheduled": scheduled,
    "logs": logged,
    "without bias": without_bias,
    "two hidden layers": two_hidden,
    "an equal pair with equal targets": equal_pair,
    "cached features": cached,
    "tanh": by(lambda _: nn.Tanh()),
    "sigmoid": by(lambda _: nn.Sigmoid()),
    "SiLU": by(lambda _: nn.SiLU()),
    "ReLU": by(lambda _: nn.ReLU()),
    "dropout": by(lambda _: nn.Sequential(nn.Softplus(10), nn.Dropout(0.2))),
    "BatchNorm": by(lambda width: nn.Sequential(nn.Softplus(10), nn.BatchNorm1d(width))),
    "LayerNorm": by(lambda width: nn.Sequential(nn.Softplus(10), nn.LayerNorm(width))),
}
# With these the documentation says that something is limited, or the method does not apply.
LIMITED = {"an equal pair with equal targets", "ReLU"}


def build(case: Case) -> Run:
    run = VARIANTS[case.variant](case)
    run.covered = case.variant not in LIMITED
    return run


KIND = Kind(
    "honest",
    list(VARIANTS),
    lambda case: judge(case, build, honest=True),
    ("rule", "loss", "precision", "module", "batch", "n", "inputs", "spare", "classes", "seed"),
    each=7,
    choices={"precision": ("32-true", "64-true")},
)
