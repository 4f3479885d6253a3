"""Fine-tuning of torchvision's networks, randomly initialised, on tiny images."""

from typing import Any

import torch
import torch.nn.functional as F
from case import Task, case
from samples import floats, labels, rows, table
from torch import Tensor, nn
from torchvision import models

TUNED, FEW = "fine-tuning of torchvision", 4
IMAGES, CLASSES = floats(3, 32, 32, count=FEW), labels(count=FEW)


def first(module: Any, batch: Any) -> Tensor:
    return module(batch[0])


class Tuned(Task):
    """Classification by ``self.net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def add(name: str, about: str, *families: str, make: Any, **rest: Any) -> None:
    case(
        TUNED,
        *families,
        data=table(IMAGES, CLASSES, batch_size=2),
        call=first,
        name=name,
        about=about,
        make=make,
        **rest,
    )(Tuned)


add(
    "resnet18",
    "resnet18, all of it",
    "normalised and reparametrized",
    make=lambda: Tuned(models.resnet18(num_classes=3)),
    options={"max_epochs": 1},
)
add(
    "vit",
    "A small VisionTransformer with dropout",
    make=lambda: Tuned(models.VisionTransformer(32, 8, 2, 2, 16, 32, 0.1, num_classes=3)),
)


def frozen_mobilenet() -> Tuned:
    net = models.mobilenet_v3_small(num_classes=3)
    net.features.requires_grad_(False)
    return Tuned(net)


@case(TUNED, data=table(IMAGES, CLASSES, batch_size=2), call=lambda m, b: m(b[0]))
class FrozenResnet(Task):
    """The features of a frozen resnet18 under a new head, computed without gradients in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = models.resnet18(), nn.Linear(512, 3)
        self.backbone.fc = nn.Identity()
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.backbone.eval()
        with torch.no_grad():
            features = self.backbone(x).flatten(1)
        return self.head(features)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


add(
    "mobilenet",
    "mobilenet_v3_small with frozen features whose BatchNorm goes on",
    "normalised and reparametrized",
    make=frozen_mobilenet,
)


@case(
    TUNED,
    "output objects",
    "tuples of outputs",
    "losses",
    data=table(floats(3, 64, 64, count=FEW), CLASSES, batch_size=2),
    options={"max_epochs": 1},
    call=lambda m, b: m.net(b[0]),
    expected="needs one argument",
)
class AuxiliaryOutputs(Task):
    """googlenet: in training mode a namedtuple with two auxiliary heads, in eval mode a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.googlenet(num_classes=3, aux_logits=True, init_weights=False)
        self.net.requires_grad_(False)
        for part in (self.net.fc, self.net.aux1.fc2, self.net.aux2.fc2):
            part.requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        heads = (out.logits, out.aux_logits2, out.aux_logits1)
        return sum(weight * F.cross_entropy(each, batch[1]) for weight, each in zip((1, 0.3, 0.3), heads, strict=True))


@case(
    TUNED,
    "sequence and image outputs",
    "output objects",
    "dict batches",
    options={"max_epochs": 1},
    call=lambda m, b: m(b["image"])["out"],
    data=rows(2, image=floats(3, 4, 4, count=FEW), mask=labels(2, 4, 4, count=FEW)),
)
class SegmentationDict(Task):
    """lraspp on a mobilenet: {"out": B x C x H x W}, only its classifier trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=2)
        self.net.backbone.requires_grad_(False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.net(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["image"])["out"], batch["mask"])
