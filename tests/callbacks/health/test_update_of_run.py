"""What is measured along the next update of a run, for any optimizer of torch, and that the run does not notice."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from optimizers_of_ones_own import Lion, Lookahead, Muon
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics, ConvergenceHealth, Probe
from lightning_conv.callbacks.health.update_of_run import UpdateOfRun
from lightning_conv.callbacks.health.watched_step import StepSeen, WatchedStep

X = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, :3].prod(1), X[:, 3:].sum(1).sin()], 1)


class Net(pl.LightningModule):
    """A network with dropout, with BatchNorm, or without, and any optimizer."""

    def __init__(self, optimizer, dropout=0.0, normalised=False, **options):
        super().__init__()
        torch.manual_seed(0)
        inner = nn.BatchNorm1d(24) if normalised else nn.Dropout(dropout)
        self.net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), inner, nn.Linear(24, 2))
        self.optimizer, self.options = optimizer, options

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        made = self.optimizer(self.parameters(), **self.options)
        return {"optimizer": made, "lr_scheduler": optim.lr_scheduler.ExponentialLR(made, 0.99)}


class Clocked(Lion):
    """Draws random numbers in its step."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each.add_(torch.randn_like(each), alpha=1e-4)


RUNS = {
    "sgd": (optim.SGD, {"lr": 0.05}),
    "momentum": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (optim.AdamW, {"lr": 0.01}),
    "adamax": (optim.Adamax, {"lr": 0.005}),
    "adadelta": (optim.Adadelta, {"lr": 0.5}),
    "lion": (Lion, {"lr": 0.002, "weight_decay": 0.1}),
    "muon": (Muon, {"lr": 0.01}),
    "clocked": (Clocked, {"lr": 0.002}),
}


@pytest.fixture
def fit(make_trainer):
    def run(module, callbacks, *, batch=48, steps=12, **options):
        pl.seed_everything(0, verbose=False)
        trainer = make_trainer(callbacks, max_epochs=steps, **options)
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=batch, shuffle=batch < 48))
        return trainer

    return run


def health():
    return ConvergenceHealth(Probe(48), every_n_steps=4)


@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_the_same_bit_for_bit(fit, name):
    make, options = RUNS[name]
    ends = []
    for callbacks in ([], [health()]):
        module = Net(make, dropout=0.2, **options)
        trainer = fit(module, callbacks, batch=16)
        state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        ends.append((module.state_dict(), state, torch.get_rng_state(), getattr(trainer.optimizers[0], "taken", 0)))
    (weights, state, generator, taken), (others, other_state, other_generator, other_taken) = ends
    assert all(torch.equal(each, others[key]) for key, each in weights.items())
    for key, values in state.items():
        assert all(
            torch.equal(torch.as_tensor(each), torch.as_tensor(other_state[key][part])) for part, each in values.items()
        )
    assert torch.equal(generator, other_generator)
    assert taken == other_taken


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "adamax", "adadelta"])
def test_the_critical_rate_is_the_one_with_which_the_next_step_raises_the_loss(fit, name):
    make, options = RUNS[name]
    found = health()
    module = Net(make, **options)
    trainer = fit(module, [found], steps=8)
    ratio = float(trainer.callback_metrics["health/critical_ratio"])
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert float(trainer.callback_metrics["health/critical_sharpness"]) == pytest.approx(2 * ratio / rate)
    if options.get("weight_decay"):
        return  # the decay of the weights is no part of an update that is proportional to the rate alone
    before = F.mse_loss(module(X), Y).item()
    for factor, raised in ((0.9, False), (1.1, True)):
        other, optimizer = copy.deepcopy(module), None
        optimizer = make(other.parameters(), **options)
        optimizer.load_state_dict(trainer.optimizers[0].state_dict())
        optimizer.param_groups[0]["lr"] = rate * factor / ratio
        F.mse_loss(other(X), Y).backward()
        optimizer.step()
        assert (F.mse_loss(other(X), Y).item() > before) is raised


def test_for_descent_it_is_no_more_than_the_stability_ratio(fit):
    trainer = fit(Net(optim.SGD, lr=0.05), [health()], steps=16)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 < metrics["health/critical_ratio"] <= 1.1 * metrics["health/stability"]


class Weights(pl.Callback):
    """Keeps the weights before and after every step, by the number of steps before it."""

    def __init__(self):
        self.before, self.after = {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.setdefault(trainer.global_step, copy.deepcopy(pl_module.state_dict()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.setdefault(trainer.global_step - 1, copy.deepcopy(pl_module.state_dict()))


OWN = {
    "lion": ({}, {}),
    "muon": ({}, {}),
    "clocked": ({"batch": 16}, {}),
    "lookahead": ({}, {}),
    "lion in batches": ({"batch": 16}, {}),
    "lion accumulated": ({"batch": 16, "accumulate_grad_batches": 3}, {}),
    "lion clipped": ({"batch": 16, "gradient_clip_val": 0.1}, {}),
    "lion normalised": ({"batch": 16}, {"normalised": True}),
}


def of_own(name, **options):
    kind = name.split()[0]
    if kind == "lookahead":
        return Net(lambda p, lr: Lookahead(optim.SGD(p, lr=lr)), lr=0.05, **options)
    make, settings = RUNS[kind]
    return Net(make, **settings, **options)


@pytest.mark.parametrize("name", OWN)
def test_the_step_that_an_optimizer_of_ones_own_has_made_is_looked_at(fit, name):
    settings, options = OWN[name]
    found, seen = health(), Weights()
    module = of_own(name, **options)
    trainer = fit(module, [seen, found], **settings)
    (stability,) = [each for each in found.findings if each.name == "stability"]
    kind = type(trainer.optimizers[0]).__name__
    assert stability.sentence.startswith(f"The step after step {stability.step} ")
    assert (
        f"no limit of stability is known for {kind}, so this rests on the loss along this step alone"
        in stability.sentence
    )
    assert stability.level in ("ok", "notice")
    assert stability.step % 4 == 0
    assert stability.step >= 4
    assert not {"stability", "critical_sharpness"} & {each for names in found.not_judged.values() for each in names}
    before, after = seen.before[stability.step], seen.after[stability.step]
    other = copy.deepcopy(module).train()
    if not options:
        other.eval()  # BatchNorm takes the statistics of the batch in a training step

    def loss(factor):
        at = {
            key: each + factor * (after[key] - each) if each.is_floating_point() else each
            for key, each in before.items()
        }
        other.load_state_dict(at)
        inputs = found._kernel.inputs if found._kernel is not None else found._restored["inputs"]
        targets = found._restored["targets"]
        return F.mse_loss(other.double()(inputs.double()), targets.double()).item()

    if stability.upper == math.inf or not stability.lower:
        assert (loss(1.0) > loss(0.0)) is bool(stability.lower)
        return
    assert loss(0.93 / stability.value) <= loss(0.0) < loss(1.07 / stability.value)
    assert float(trainer.callback_metrics["health/critical_ratio"]) == pytest.approx(stability.value)


def test_it_is_logged_at_the_step_of_the_measurement_before_it(fit, tmp_path):
    found = health()
    trainer = fit(of_own("lion"), [found], logger=TensorBoardLogger(tmp_path), steps=10)
    logged = EventAccumulator(trainer.logger.log_dir)
    logged.Reload()
    steps = [each.step for each in logged.Scalars("health/stability")]
    assert steps == [0, 4, 8]
    assert {each.step for each in logged.Scalars("health/critical_ratio")} <= {0, 4, 8}
    last = logged.Scalars("health/stability")[-1].value
    assert float(trainer.callback_metrics["health/stability"]) == pytest.approx(last)
    assert found.steps_of_values["health/stability"] == 8


class Manual(Net):
    """Steps by itself."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


def test_a_step_that_cannot_be_told_is_left_out_with_the_reason(fit):
    found = health()
    fit(Manual(Lion, lr=0.002), [found])
    assert not [each for each in found.findings if each.name == "stability"]
    assert any("critical_sharpness" in names and "optimizes manually" in why for why, names in found.not_judged.items())


def test_a_step_that_the_budget_does_not_allow_for_is_left_out_and_no_weights_are_kept(fit, monkeypatch):
    found = health()
    monkeypatch.setattr(found, "_affords", lambda step, seconds: False)
    fit(Net(Lion, lr=0.002), [found])
    assert not [each for each in found.findings if each.name == "stability"]
    assert any(
        "critical_sharpness" in names and "longer than the run allows" in why for why, names in found.not_judged.items()
    )
    assert not found._record.waits


def test_weights_are_copied_at_a_step_after_a_measurement_only(fit, monkeypatch):
    copied = []
    keep = WatchedStep.before

    def noted(self, run):
        keep(self, run)
        copied.append(run.step)

    monkeypatch.setattr(WatchedStep, "before", noted)
    fit(Net(Lion, lr=0.002), [health()])
    assert copied == [0, 4, 8]


class Counted(optim.SGD):
    """Takes its rate from a count that all copies share."""

    steps = 0

    def step(self, closure=None):
        Counted.steps += 1
        for group in self.param_groups:
            group["lr"] = 0.05 / Counted.steps
        return super().step(closure)


def test_a_count_that_copies_of_the_optimizer_share_is_left_alone(fit):
    ends = []
    for callbacks in ([], [health()]):
        Counted.steps = 0
        module = Net(Counted, lr=0.05)
        fit(module, callbacks)
        ends.append((Counted.steps, module.state_dict()))
    (steps, weights), (others, other_weights) = ends
    assert steps == others == 12
    assert all(torch.equal(each, other_weights[key]) for key, each in weights.items())


@pytest.mark.parametrize("name", ["adamax", "adadelta"])
def test_the_stability_sentence_of_an_optimizer_without_a_rule_rests_on_it_and_says_so(fit, name):
    make, options = RUNS[name]
    found = health()
    fit(Net(make, **options), [found])
    (stability,) = [each for each in found.findings if each.name == "stability"]
    assert f"no limit of stability is known for {make.__name__}, so this rests on the loss" in stability.sentence
    assert stability.level in ("ok", "notice")
    assert not any("stability" in names for names in found.not_judged.values())


def test_the_share_of_zeros_is_that_of_the_gradient_of_the_probe(fit):
    module = Net(optim.SGD, lr=0.05)
    with torch.no_grad():
        module.net[0].bias[:6] = -50.0  # dead for good
    trainer = fit(module, [health()], steps=4)
    F.mse_loss(module(X), Y).backward()
    gradients = torch.cat([each.grad.flatten() for each in module.parameters()])
    share = float((gradients == 0).double().mean())
    assert share >= (6 * 9 + 2 * 6) / gradients.numel()
    assert float(trainer.callback_metrics["health/zero_gradients"]) == pytest.approx(share)


def test_one_figure_has_the_layers(fit, tmp_path):
    found = health()
    trainer = fit(Net(optim.AdamW, lr=0.01), [found], logger=TensorBoardLogger(tmp_path))
    logged = EventAccumulator(trainer.logger.log_dir)
    logged.Reload()
    assert "health/layer_gradients" in logged.Tags()["images"]
    first, last = found._record.layers
    assert (first.name, last.name) == ("net.0", "net.3")
    assert all(each.norm > 0 and each.update > 0 for each in (first, last))


class Scales(Net):
    def on_before_optimizer_step(self, optimizer):
        for each in self.parameters():
            each.grad.mul_(2.0)


def test_where_something_stands_between_gradient_and_step_the_reason_is_said(fit):
    found = health()
    trainer = fit(Scales(optim.AdamW, lr=0.01), [found])
    assert "health/critical_ratio" not in trainer.callback_metrics
    assert any(
        "critical_sharpness" in names and "own on_before_optimizer_step" in why
        for why, names in found.not_judged.items()
    )
    assert found._record.layers
    assert all(math.isnan(each.update) for each in found._record.layers)


@pytest.mark.parametrize(("algorithm", "bound"), [("norm", 0.1), ("value", 0.01), ("norm", 100.0)])
def test_gradients_are_clipped_as_in_the_run(fit, algorithm, bound):
    found, module = health(), Net(optim.SGD, lr=0.05, momentum=0.5)
    trainer = fit(module, [found], steps=8, gradient_clip_val=bound, gradient_clip_algorithm=algorithm)
    layers = {each.name: each for each in found._record.layers}
    other = copy.deepcopy(module)
    optimizer = optim.SGD(other.parameters(), lr=0.05, momentum=0.5)
    optimizer.load_state_dict(trainer.optimizers[0].state_dict())
    F.mse_loss(other(X), Y).backward()
    clip = torch.nn.utils.clip_grad_norm_ if algorithm == "norm" else torch.nn.utils.clip_grad_value_
    clip(other.parameters(), bound)
    optimizer.step()
    for name, layer in layers.items():
        pairs = zip(other.get_submodule(name).parameters(), module.get_submodule(name).parameters(), strict=True)
        moved, size = (
            sum(float(x) for x in each)
            for each in zip(*(((a - b).square().sum(), b.square().sum()) for a, b in pairs), strict=True)
        )
        assert layer.update == pytest.approx(math.sqrt(moved / size), rel=1e-3)
    assert float(trainer.callback_metrics["health/critical_ratio"]) > 0


def test_the_step_of_an_optimizer_that_wants_a_closure_is_looked_at(fit):
    found, seen = health(), Weights()
    fit(Net(optim.LBFGS, lr=0.1, max_iter=2), [found, seen], steps=6)
    (stability,) = [each for each in found.findings if each.name == "stability"]
    assert stability.sentence.startswith("The step after step 4 ")
    assert "no limit of stability is known for LBFGS" in stability.sentence


def test_a_resumed_run_finds_what_the_whole_one_finds(fit, tmp_path):
    whole = health()
    fit(Net(Lion, lr=0.002), [whole])
    first = fit(Net(Lion, lr=0.002), [health()], steps=8)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = health()
    trainer = pl.Trainer(
        max_epochs=12, callbacks=[resumed], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu", enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(Lion, lr=0.002), DataLoader(TensorDataset(X, Y), batch_size=48), ckpt_path=tmp_path / "half.ckpt")
    assert [each.to_json() for each in resumed.findings] == [each.to_json() for each in whole.findings]
    assert resumed._record.scalars == whole._record.scalars


def test_it_is_found_in_a_group_that_rests_between_measurements(fit):
    group = ConvergenceDiagnostics(Probe(16), which="oymak")
    fit(Net(Lion, lr=0.002), [group], steps=40)
    (found,) = [each for each in group.callbacks if isinstance(each, ConvergenceHealth)]
    (stability,) = [each for each in found.findings if each.name == "stability"]
    assert stability.sentence.startswith("The step after step ")


def test_a_watched_step_of_which_nothing_is_found_leaves_no_number_of_an_earlier_one():
    updates = UpdateOfRun()
    updates._own, updates.scalars = True, {"critical_ratio": 0.5, "critical_sharpness": 3.0}
    net = nn.Linear(2, 1)
    run = SimpleNamespace(
        network=net,
        trainer=SimpleNamespace(optimizers=[optim.SGD(net.parameters(), lr=0.1)]),
        parameters_of_network=dict(net.named_parameters()),
        measurement=SimpleNamespace(probe=Probe()),
    )
    seen = StepSeen(3, 0.1, {name: each.detach().clone() for name, each in net.named_parameters()})
    assert updates.observe(run, seen) == "the update is zero"
    assert all(math.isnan(each) for each in updates.scalars.values())
