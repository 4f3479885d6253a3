"""A run of a small LightningModule under the guard, and the truth about it by ways that share nothing with the guard."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from adversary import Case, reason
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.run.guarded import set_strict

MODULES = {
    "cross entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "huber": nn.HuberLoss,
    "bce": nn.BCEWithLogitsLoss,
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "cross entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


class Net(LightningModule):
    """Trunk, head, loss; what a variant puts in the place of the forward or the step is a function of the module."""

    def __init__(
        self, trunk: nn.Module, head: nn.Module, loss_fn: nn.Module | None = None, step: Any = None, forward: Any = None
    ) -> None:
        super().__init__()
        self.trunk, self.head, self._step, self._forward = trunk, head, step, forward
        self.optimizer: dict[str, Any] = {"lr": 0.05}
        if loss_fn is not None:
            self.loss_fn = loss_fn

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x) if self._forward else self.head(self.trunk(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self._step(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.optimizer)


@dataclass
class Run:
    """A module, its data, and what is known of it by construction."""

    module: LightningModule
    x: Tensor
    y: Tensor
    loss: str
    claimable: bool = (
        True  # whether the step's loss is one of the outputs W h + b alone; False: it is not, by construction
    )
    covered: bool = True  # whether nothing that the guard documents limits its guarantee
    guard: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    epochs: int = 3
    shuffled: bool = False
    collate: Any = None
    seen: ExpressivityGuard | None = None


def trunk(case: Case, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(case.inputs, case.n + case.spare), activation or nn.Softplus(10))


def data(case: Case) -> tuple[Tensor, Tensor]:
    x = torch.randn(case.n, case.inputs)
    if case.loss == "cross entropy":
        return x, torch.randint(0, case.classes, (case.n,))
    if case.loss == "bce":
        return x, torch.randint(0, 2, (case.n, case.classes)).float()
    return x, 3 * torch.randn(case.n, case.classes)


def loss_of(case: Case) -> Callable[..., Tensor]:
    return FUNCTIONS[case.loss]


def plain(case: Case, body: nn.Module | None = None, head: nn.Module | None = None, **options: Any) -> Run:
    """Return a run with a plain loss, as a module or as a function."""
    x, y = data(case)
    module = MODULES[case.loss]() if case.module else None
    function = loss_of(case)

    def step(net: Any, batch: Any) -> Tensor:
        return (net.loss_fn if hasattr(net, "loss_fn") else function)(net(batch[0]), batch[1])

    width = case.n + case.spare
    net = Net(
        body or trunk(case),
        head or nn.Linear(width, case.classes),
        module,
        options.pop("step", step),
        options.pop("forward", None),
    )
    return Run(net, x, y, case.loss, **options)


def fit(case: Case, build: Callable[[Case], Run]) -> Run | str:
    """Train the run under the guard; return it, or the reason why it was refused."""
    torch.manual_seed(case.seed)
    run = build(case)
    dtype = torch.float64 if case.precision == "64-true" else torch.float32
    x = run.x.to(dtype)
    y = run.y.to(dtype) if run.y.is_floating_point() else run.y
    options = {"switch_at": 1, "step_rule": case.rule, "method": case.method} | run.guard
    if not case.module and "loss_fn" not in options:
        options |= {"loss_fn": loss_of(case), "infimum": 0.0}
    given = {"callbacks": [], "precision": case.precision, "max_epochs": run.epochs} | run.trainer
    run.seen = guard = ExpressivityGuard(**options)
    loader = DataLoader(
        TensorDataset(x, y), batch_size=case.batch or case.n, shuffle=run.shuffled, collate_fn=run.collate
    )
    before = set_strict(True)
    try:
        with quiet():
            Trainer(
                **given | {"callbacks": [*given["callbacks"], guard]},
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(run.module, loader)
    except (MisconfigurationException, ValueError) as error:
        return reason(error)
    finally:
        set_strict(before)
    return run


@contextlib.contextmanager
def quiet() -> Any:
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def exact(run: Run, batch: int = 0) -> tuple[np.ndarray, Tensor]:
    """Return [h, 1] and the outputs of the user's own module in float64, in batches as the run has them, by a hook of our own."""
    twin = copy.deepcopy(run.module).double().eval()
    seen: list[Tensor] = []
    twin.head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    with torch.no_grad():
        outputs = torch.cat([twin(some) for some in run.x.double().split(batch or len(run.x))])
    h = torch.cat(seen).reshape(len(run.x), -1)
    ones = [h.new_ones(len(h), 1)] if getattr(twin.head, "bias", None) is not None else []
    return torch.cat([h, *ones], 1).numpy(), outputs


def targets_reached(features: np.ndarray, y: Tensor, loss: str) -> bool | None:
    """Return whether the infimum over the head is that over all outputs; None: too close to call in float64."""
    sizes = np.linalg.svd(features, compute_uv=False)
    if len(sizes) == len(features) and sizes[-1] > 1e-8 * sizes[0]:
        return True
    if loss in ("mse", "huber"):
        best, *_ = np.linalg.lstsq(features, y.double().numpy(), rcond=1e-13)
        left = np.abs(features @ best - y.double().numpy()).max()
        return False if left > 1e-5 * float(y.abs().max()) else None
    labels = F.one_hot(y, int(y.max()) + 1).numpy() if loss == "cross entropy" else y.numpy()
    margin = _margin(features / np.abs(features).max(), labels, loss == "cross entropy")
    return True if margin > 0.99 else False if margin < 1e-9 else None


def _margin(features: np.ndarray, labels: np.ndarray, one_class: bool) -> float:
    """Return the largest margin up to 1 of any head, by a linear programme."""
    n, m = features.shape
    c = labels.shape[1]
    rows = []
    for i in range(n):
        if one_class:
            right = int(labels[i].argmax())
            others = [k for k in range(c) if k != right]
            for other in others:
                w = np.zeros((c, m))
                w[right], w[other] = features[i], -features[i]
                rows.append(w.ravel())
        else:
            for k in range(c):
                w = np.zeros((c, m))
                w[k] = features[i] * (2 * labels[i, k] - 1)
                rows.append(w.ravel())
    a = np.hstack([-np.array(rows), np.ones((len(rows), 1))])
    bounds = [(None, None)] * (c * m) + [(None, 1.0)]
    found = linprog([0.0] * (c * m) + [-1.0], A_ub=a, b_ub=np.zeros(len(rows)), bounds=bounds)
    return float(found.x[-1]) if found.status == 0 else float("nan")
