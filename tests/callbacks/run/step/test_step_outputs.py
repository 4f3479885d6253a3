"""The training step as a function of the network's outputs, with the network's calls in it or without them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_conv.callbacks import KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.run import observe_run
from lightning_conv.callbacks.run.losses import points
from lightning_conv.callbacks.run.observe_run import copy_of
from lightning_conv.callbacks.run.step.observation import observe
from lightning_conv.callbacks.run.step.step_outputs import StepOutputs
from lightning_conv.losses.of_outputs import evaluate
from lightning_conv.networks.inputs import sample_count


class Net(nn.Linear):
    """Counts its calls, in all copies, and keeps what enters it."""

    calls = 0

    def forward(self, x):
        Net.calls += 1
        self.kept = x
        return super().forward(x)


class Module(pl.LightningModule):
    def __init__(self, loss, net=Net):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = net(4, 3), loss

    def training_step(self, batch, batch_idx):
        return self.loss(self, self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def data(count=24):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 4, generator=generator), torch.randn(count, 3, generator=generator)
    return DataLoader(list(zip(x, y, strict=True)), batch_size=8)


class AtStart(pl.Callback):
    """Does something with the trainer when training begins."""

    def __init__(self, do):
        self.do = do

    def on_train_start(self, trainer, pl_module):
        self.found = self.do(trainer)


def step_of(make_trainer, loss, net=Net):
    def few(trainer):
        twin = copy_of(trainer, trainer.lightning_module)
        batch = next(iter(data()))
        observed = observe(twin, batch)
        return StepOutputs(twin, batch, observed.sources, 8)

    callback = AtStart(few)
    make_trainer([callback], max_steps=1).fit(Module(loss, net), data())
    return callback.found


def mse(module, u, y):
    return F.mse_loss(u, y)


def with_kept(module, u, y):
    return F.mse_loss(u, y) + module.net.kept.square().mean() * u.square().mean()


def test_without_the_calls_it_is_the_same_function_and_the_network_is_not_called(make_trainer):
    few = step_of(make_trainer, mse)
    quick, u = few.without_calls(), torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    with_calls = evaluate(few, u)
    before = Net.calls
    without = evaluate(quick, u)
    assert Net.calls == before
    assert torch.equal(without.slope, with_calls.slope)
    assert without.value == with_calls.value
    assert torch.equal(quick.present, few.present)
    assert "forward" not in vars(quick.twin.module.net)


@pytest.mark.parametrize(
    ("wrap", "unwrap", "left_out"),
    [
        (lambda u: {"out": u, "loss": None}, lambda made: made["out"], True),
        (lambda u: ("name", [u]), lambda made: made[1][0], True),
        (lambda u: SimpleNamespace(logits=u, step=3), lambda made: made.logits, True),
        (
            lambda u: (u, u.detach().exp()),
            lambda made: made[0] + 0 * made[1],
            False,
        ),  # the other one is not a function of u then
    ],
)
def test_calls_are_left_out_where_one_tensor_is_all_that_they_return(make_trainer, wrap, unwrap, left_out):
    class Wrapped(Net):
        def forward(self, x):
            return wrap(super().forward(x))

    def loss(module, made, y):
        return F.mse_loss(unwrap(made), y)

    few = step_of(make_trainer, loss, Wrapped)
    quick, u = few.without_calls(), torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    with_calls, before = evaluate(few, u), Net.calls
    without = evaluate(quick, u)
    assert (Net.calls == before) is left_out
    assert torch.equal(without.slope, with_calls.slope)
    assert without.value == with_calls.value


def test_it_takes_another_number_of_samples_without_the_calls(make_trainer):
    few = step_of(make_trainer, mse)
    u, y = torch.randn(3, 3), torch.randn(3, 3)
    part = replace(few.without_calls(), batch=[torch.randn(3, 4), y], samples=3)
    assert evaluate(part, u).value == pytest.approx(float(F.mse_loss(u, y)))


def test_a_step_that_needs_what_the_network_keeps_is_evaluated_with_its_calls(make_trainer):
    few = step_of(make_trainer, with_kept)
    assert points.without_needless_calls(few) is few
    assert points.without_needless_calls(step_of(make_trainer, mse)) is not few


def test_a_hook_that_changes_the_outputs_is_not_left_out(make_trainer):
    few = step_of(make_trainer, mse)
    few.twin.module.net.register_forward_hook(lambda module, args, output: 2 * output)
    assert points.without_needless_calls(few) is few


def test_finding_the_loss_calls_the_network_a_few_times_only(make_trainer):
    monitor = KernelStability(Probe(8), every_n_steps=1)
    calls = []
    find = observe_run.find_run_loss

    def counted(*args):
        before = Net.calls
        found = find(*args)
        calls.append(Net.calls - before)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe_run, "find_run_loss", counted)
        make_trainer([monitor], max_steps=1).fit(Module(mse), data())
    assert "MSELoss" in monitor.measured
    assert calls[0] <= 12  # some fifty evaluations


def test_a_slow_step_is_measured_on_few_of_the_samples_and_says_of_how_many(
    make_trainer, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(observe_run, "SLOW", 0.0)
    monkeypatch.setattr(observe_run, "FEW", 6)
    monitor = LambdaMin()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer = make_trainer([monitor], max_epochs=1, checkpoint=True)
        trainer.fit(Module(mse), data())
    state = monitor.state_dict()
    assert (state["read"], sample_count(state["inputs"])) == (6, 6)
    assert "6 of 24 samples" in caplog.text
    monkeypatch.setattr(observe_run, "SLOW", 1e4)
    again = LambdaMin()
    make_trainer([again], max_epochs=2).fit(
        Module(mse), data(), ckpt_path=trainer.checkpoint_callback.last_model_path or None
    )
    assert again.state_dict()["read"] == 6
    assert "MSELoss" in again.measured


@pytest.mark.parametrize("monitor", [LambdaMin(Probe(size=24)), LambdaMin(every_n_steps=2)])
def test_what_was_asked_for_is_read_however_slow_the_step_is(make_trainer, monkeypatch, monitor):
    monkeypatch.setattr(observe_run, "SLOW", 0.0)
    monkeypatch.setattr(observe_run, "FEW", 6)
    make_trainer([monitor], max_epochs=1).fit(Module(mse), data())
    assert monitor.state_dict()["read"] == 24
