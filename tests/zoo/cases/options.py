"""Options of the trainer and its callbacks: precisions, accumulation, clipping, schedulers, averages of the weights."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Reading, Task, case
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from samples import floats, table
from torch import Tensor, nn

from cases.batches import X, Y, mlp

PRECISION, OPTIONS = "precision", "trainer options"


class Net(Task):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def first(module: Any, batch: Any) -> Tensor:
    return module(batch[0])


def add(name: str, about: str, *families: str, module: Any = Net, **rest: Any) -> None:
    case(*families, data=table(X, Y), call=first, name=name, about=about, **rest)(module)


add("bf16_mixed", "precision='bf16-mixed'", PRECISION, options={"precision": "bf16-mixed"}, tolerance=3e-2)
add("double", "precision='64-true'", PRECISION, options={"precision": "64-true"}, tolerance=1e-10)
add("bf16_true", "precision='bf16-true'", PRECISION, options={"precision": "bf16-true"}, tolerance=3e-2)
add("half_true", "precision='16-true' on the CPU", PRECISION, options={"precision": "16-true"}, tolerance=1e-2)


@case(PRECISION, data=table(X, Y), call=first)
class CastsInside(Net):
    """A forward that calls .float() on its input: no float64 path."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float()) if self.net[0].weight.dtype == torch.float32 else self.net(x)


@case(PRECISION, "squeezed outputs", data=table(X, Y), call=first)
class CastsAtTheEnd(Net):
    """Logits made float32 at the end, as for a stable loss."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).float()


@case(PRECISION, data=table((X * 50).clamp(0, 255).to(torch.uint8), Y), call=first)
class BytesIn(Net):
    """Inputs of uint8 that the forward scales in the module's own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.net[0].weight.dtype) / 255)


class Scheduled(Net):
    """AdamW with warm-up per step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


class Groups(Net):
    """Two parameter groups with rates of their own, and a scheduler that watches the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.net[0].parameters(), "lr": 0.01},
            {"params": self.net[2].parameters(), "weight_decay": 0.1},
        ]
        optimizer = torch.optim.RMSprop(groups, 0.02)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
            "monitor": "train_loss",
        }


class LBFGS(Net):
    """LBFGS, whose closure runs the step several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)


class Averaged(Callback):
    """A moving average of the weights that takes their place when the training ends."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.mean = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            self.mean[name].lerp_(parameter.detach(), 0.5)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.data.copy_(self.mean[name])


add(
    "accumulated",
    "Gradients of two batches accumulated, clipped by norm",
    OPTIONS,
    options={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
)
add(
    "accumulation_scheduler",
    "GradientAccumulationScheduler",
    OPTIONS,
    callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 3})],
)
add(
    "clipped_by_value",
    "Gradients clipped by value",
    OPTIONS,
    options={"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
)
add("one_cycle", "AdamW with OneCycleLR per step", OPTIONS, module=Scheduled)
add("plateau", "Two parameter groups with ReduceLROnPlateau", OPTIONS, module=Groups)
add("lbfgs", "LBFGS: the optimizer runs the step several times", OPTIONS, "several calls", module=LBFGS)
add("own_average", "A callback puts an average of the weights in at the end", OPTIONS, callbacks=lambda: [Averaged()])
add("ema", "EMAWeightAveraging", OPTIONS, callbacks=lambda: [EMAWeightAveraging(decay=0.5, update_every_n_steps=1)])
add(
    "swa",
    "StochasticWeightAveraging",
    OPTIONS,
    callbacks=lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)],
    options={"max_epochs": 3},
)
add(
    "anomalies",
    "detect_anomaly and the inference mode off",
    OPTIONS,
    options={"detect_anomaly": True, "inference_mode": False},
)


@case(
    OPTIONS,
    "normalised and reparametrized",
    data=table(floats(1, 6, 6), Y),
    call=Reading(first, ("head.", "backbone.1.")),
    callbacks=lambda: [BackboneFinetuning(1)],
)
class BackboneUnfrozen(Net):
    """BackboneFinetuning thaws the backbone in the second epoch: measured are the head and the BatchNorm, trainable from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), 0.05)
