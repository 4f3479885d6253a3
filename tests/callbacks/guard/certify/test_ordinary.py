"""What is ordinary in a LightningModule, and changes nothing of what is certified."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from lightning_conv.callbacks import ExpressivityGuard
from tests.callbacks.guard.certify.nets import CLASSES, LATE, SWITCH, Net, table


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


class SmallLabels(Net):
    """Labels of 32 bits, of which the step makes class numbers."""

    def __init__(self):
        super().__init__(nn.CrossEntropyLoss())

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1].long())


@pytest.mark.parametrize("rule", ["base", "certified", "solve"])
@pytest.mark.parametrize("module", [Metrics, Watched, Averaged])
def test_it_is_certified(fit, module, rule):
    guard = fit(module(), guard=ExpressivityGuard(SWITCH, step_rule=rule))
    assert (guard.phase, guard.verdict, guard.why, guard.caveats) == (2, "certified", "", [])


class ClippedByHand(Net):
    """Clips in a hook after the backward pass, as manual code has it."""

    def __init__(self):
        super().__init__(nn.CrossEntropyLoss())

    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.01)


def test_gradients_that_are_clipped_by_hand(fit):
    guard = fit(ClippedByHand())
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


def test_a_result_of_another_shape_ends_no_run(fit):
    """The network gives (n, 3, 1) where the step, and so the head, see rows."""

    class Shaped(Net):
        def forward(self, x):
            u = self.head(self.trunk(x))
            return u if self.training else u.reshape(-1, CLASSES, 1)

        def training_step(self, batch, batch_idx):
            u = self.head(self.trunk(batch[0]))
            return F.cross_entropy(torch.cat([u, u[:1]]), torch.cat([batch[1], batch[1][:1]]))

    assert fit(Shaped(nn.CrossEntropyLoss())).verdict == "undecided"


def test_labels_of_32_bits(fit):
    x, y = table().tensors
    guard = fit(SmallLabels(), data=TensorDataset(x, y.int()))
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


def test_certified_steps_where_the_optimizer_decays_weights(fit):
    class Decaying(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    guard = fit(Decaying(nn.CrossEntropyLoss()), guard=ExpressivityGuard(SWITCH, step_rule="certified"))
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


LOSSES = {
    "capped": lambda u, y: (u - F.one_hot(y, CLASSES)).abs().clamp(max=1.0).mean(),
    "targets in float32": lambda u, y: F.binary_cross_entropy_with_logits(u, F.one_hot(y, CLASSES).float()),
}


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_other_kinds_are_functions_of_the_outputs(fit, name, precision):
    class Own(Net):
        def training_step(self, batch, batch_idx):
            return LOSSES[name](self(batch[0]), batch[1])

    x, y = table().tensors
    data = TensorDataset(x.double() if precision == "64-true" else x, y)
    guard = fit(Own(), data=data, precision=precision)
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


@pytest.mark.slow
def test_a_compiled_trunk(fit):
    class Compiled(Net):
        def __init__(self):
            super().__init__(nn.CrossEntropyLoss())
            self.trunk = torch.compile(self.trunk)

    guard = fit(Compiled())
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


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
