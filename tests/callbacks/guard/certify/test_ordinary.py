"""What is ordinary in a LightningModule, and changes nothing of what is certified."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_conv.callbacks import ExpressivityGuard
from tests.callbacks.guard.certify.nets import CLASSES, LATE, SWITCH, Net


class Metrics(Net):
    """Metrics of several kinds, as templates have them."""

    def __init__(self):
        super().__init__(nn.CrossEntropyLoss())
        of = {"task": "multiclass", "num_classes": CLASSES}
        self.train_acc, self.val_acc, self.mean = (
            torchmetrics.Accuracy(**of),
            torchmetrics.Accuracy(**of),
            torchmetrics.MeanMetric(),
        )
        self.all = torchmetrics.MetricCollection(
            [torchmetrics.Accuracy(**of), torchmetrics.F1Score(**of), torchmetrics.ConfusionMatrix(**of)]
        )

    def training_step(self, batch, batch_idx):
        u = self(batch[0])
        loss = self.loss_fn(u, batch[1])
        self.train_acc(u, batch[1]), self.all.update(u, batch[1]), self.mean(loss)
        self.log("train/acc", self.train_acc, on_step=True, on_epoch=True)
        return loss


class Watched(Net):
    """Hooks on all gradients that keep their norms, as loggers have them."""

    def __init__(self):
        super().__init__(nn.CrossEntropyLoss())
        self.norms = []
        for each in self.parameters():
            each.register_hook(lambda g: self.norms.append(float(g.norm())))


class Averaged(Net):
    """An average of the weights as a submodule, and a buffer that keeps a mean of the loss."""

    def __init__(self):
        super().__init__(nn.CrossEntropyLoss())
        self.ema = copy.deepcopy(self.trunk)
        self.average = AveragedModel(nn.Sequential(self.trunk, self.head), multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.kept = nn.Module()
        self.kept.register_buffer("mean", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.kept.mean.lerp_(loss.detach(), 0.1)
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for mean, each in zip(self.ema.parameters(), self.trunk.parameters(), strict=True):
            mean.lerp_(each, 0.1)
        self.average.update_parameters(nn.Sequential(self.trunk, self.head))


@pytest.mark.parametrize("rule", ["base", "certified", "solve"])
@pytest.mark.parametrize("module", [Metrics, Watched, Averaged])
def test_it_is_certified(fit, module, rule):
    guard = fit(module(), guard=ExpressivityGuard(SWITCH, step_rule=rule))
    assert (guard.phase, guard.verdict, guard.why, guard.caveats) == (2, "certified", "", [])


class Teacher(Averaged):
    """A mean teacher, whose outputs the loss takes as soft targets in the last epoch."""

    def training_step(self, batch, batch_idx):
        u = self(batch[0])
        with torch.no_grad():
            soft = self.head(self.ema(batch[0])).softmax(1)
        return F.cross_entropy(u, soft) if self.current_epoch > LATE else self.loss(u, batch[1])


class Shrinking(Net):
    """A hook on the gradient that adds a penalty below the rounding of the comparison."""

    def __init__(self):
        super().__init__(nn.CrossEntropyLoss())
        self.head.weight.register_hook(lambda g: g + 1e-8 * self.head.weight.detach())


class NeverZeroed(Net):
    def optimizer_zero_grad(self, *_):
        if not self.late:
            self.zero_grad()


@pytest.mark.parametrize("module", [Teacher, Shrinking, lambda: NeverZeroed(nn.CrossEntropyLoss())])
def test_it_is_not_certified(fit, module):
    guard = fit(module())
    assert guard.phase == 2
    assert guard.verdict == "undecided"
