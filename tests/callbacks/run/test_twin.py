"""The training step of a copy leaves nothing behind in the run, whatever it does."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_conv.callbacks.run.call import NotAFunctionError, StepCall
from lightning_conv.callbacks.run.step.drawn_weights import draw_weights
from lightning_conv.callbacks.run.twin import NotATwinError, Twin


class Busy(pl.LightningModule):
    """A module whose training step writes wherever a step may write."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)
        self.metric = torchmetrics.MeanMetric()
        self.register_buffer("seen", torch.zeros(()))
        self.losses, self.rates, self.epochs = [], [], []

    def forward(self, x):
        return self.head(self.trunk(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x += 1  # in place
        self.seen += 1
        u = self(x + 0 * random.random() + 0 * np.random.rand())  # noqa: NPY002
        loss = (u - y).square().mean()
        self.losses.append(float(loss))
        self.metric(loss)
        self.log("loss", loss, prog_bar=True, on_epoch=True)
        self.log_dict({"again": loss})
        optimizer = self.optimizers()
        self.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["lr"] *= 0.5
        self.lr_schedulers().step()
        self.epochs.append((self.current_epoch, self.global_step, self.trainer.max_epochs))
        self.trainer.should_stop = True
        if self.logger is not None:
            self.logger.log_metrics({"x": 1.0})
        return {"loss": loss}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Look(pl.Callback):
    """Runs a function in the first batch."""

    def __init__(self, look):
        self.look, self.got = look, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.got is None:
            self.got = self.look(trainer, module, batch)


def looked(make_trainer, look, module=None):
    torch.manual_seed(0)
    module = module or Busy()
    callback = Look(look)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 2))
    make_trainer([callback], max_epochs=1).fit(module, torch.utils.data.DataLoader(data, 4))
    return callback.got


def state_of(trainer, module, batch):
    return {
        "tensors": {name: each.clone() for name, each in module.state_dict().items()},
        "gradients": [each.grad for each in module.parameters()],
        "metric": module.metric.metric_state["mean_value"].clone(),
        "lists": (list(module.losses), list(module.rates), list(module.epochs)),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        "batch": [each.clone() for each in batch],
        "stop": trainer.should_stop,
        "logged": dict(trainer.callback_metrics),
        "rng": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        "modes": [each.training for each in module.modules()],
        "hooks": [len(each._forward_pre_hooks) for each in module.modules()],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_nothing_of_the_run_changes(make_trainer):
    def look(trainer, module, batch):
        before = state_of(trainer, module, batch)
        twin = Twin(trainer, module)
        twin.step(batch, 0).backward()
        assert twin.module.losses
        assert float(twin.module.seen) == 1
        assert not torch.equal(twin.module.trunk[1].running_mean, module.trunk[1].running_mean)
        return before, state_of(trainer, module, batch)

    before, after = looked(make_trainer, look)
    for name, was in before.items():
        assert same(was, after[name]), name


def test_the_copy_draws_what_the_run_will_draw(make_trainer):
    seen = {}

    def look(trainer, module, batch):
        seen["module"] = module
        return float(Twin(trainer, module).step(batch, 0).detach())

    expected = looked(make_trainer, look)
    assert seen["module"].losses[0] == expected


def test_the_copy_can_be_told_of_a_later_step(make_trainer):
    def look(trainer, module, batch):
        twin = Twin(trainer, module, step=41, epoch=7)
        twin.step(batch, 0)
        return twin.module.epochs

    assert looked(make_trainer, look) == [(7, 41, 1)]


def test_a_step_that_was_assigned_to_the_instance_is_run_on_the_copy(make_trainer):
    module, kept = Busy(), []
    step = module.training_step

    def training_step(batch, batch_idx, given=step):
        kept.append(module.head.weight.detach().clone())
        return given(batch, batch_idx)

    module.training_step = training_step

    def look(trainer, module, batch):
        twin = Twin(trainer, module)
        with torch.no_grad():
            twin.module.head.weight.zero_()
        loss = twin.step(batch, 0)
        (slope,) = torch.autograd.grad(loss, twin.module.head.weight)
        return float(slope.abs().max()), len(kept), len(module.losses)

    slope, calls, losses = looked(make_trainer, look, module)
    assert slope > 0
    assert (calls, losses) == (0, 0)


def test_a_step_that_reaches_the_module_by_another_way_is_refused(make_trainer):
    module = Busy()
    hidden = type("Hidden", (), {"net": module, "__deepcopy__": lambda self, memo: self})()
    module.training_step = lambda batch, batch_idx: hidden.net(batch[0]).mean()

    def look(trainer, module, batch):
        with pytest.raises(NotATwinError, match="calls the module itself"):
            Twin(trainer, module).step(batch, 0)
        return [len(each._forward_pre_hooks) for each in module.modules()]

    assert set(looked(make_trainer, look, module)) == {0}


def test_the_step_as_a_function_of_the_outputs(make_trainer):
    def look(trainer, module, batch):
        twin = Twin(trainer, module)
        twin.module.eval()
        call = StepCall(twin, "head", batch)
        seen = call.observe()
        u = torch.randn(4, 2)
        assert torch.equal(seen.outputs, twin.module.head(seen.features))
        assert float(call(seen.outputs)) == float(seen.loss)
        assert float(call(u)) == float((u - batch[1]).square().mean())
        draw_weights(call.twin, 0, 3.0)
        assert float(call(u)) == float((u - batch[1]).square().mean())
        twin.module.training_step = lambda batch, batch_idx: twin.module(batch[0]).mean() + twin.module(batch[0]).mean()
        with pytest.raises(NotAFunctionError, match="calls 'head' 2 times"):
            call.observe()
        twin.module.training_step = lambda batch, batch_idx: twin.module(batch[0]).mean() * 0 if batch is None else None
        with pytest.raises(NotAFunctionError, match="calls 'head' 0 times"):
            call.observe()
        return True

    assert looked(make_trainer, look)
