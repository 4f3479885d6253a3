"""``ConvergenceHealth`` names what is wrong with a run, and accuses no run that is well."""

from __future__ import annotations

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics, ConvergenceHealth, ConvergenceReport, Probe

DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data, dtype=torch.float32) / 16, torch.tensor(DIGITS.target)
ONE_HOT = F.one_hot(Y, 10).float()


class Net(pl.LightningModule):
    """A network, a loss, an optimizer."""

    def __init__(self, net, loss_fn, optimizer, **options):
        super().__init__()
        self.net, self.loss_fn, self.optimizer, self.options = net, loss_fn, optimizer, options

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)


def mlp(width=32, activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), activation(), nn.Linear(width, 10))


def sgd(net, lr, loss=None):
    return Net(net, loss or nn.MSELoss(), torch.optim.SGD, lr=lr)


@pytest.fixture
def judged(make_trainer):
    """Train and return the findings by name."""

    def run(module, x, y, *, batch=None, epochs=20, health=None, extra=(), **options):
        health = health or ConvergenceHealth(Probe(len(x)), every_n_steps=5)
        data = DataLoader(TensorDataset(x, y), batch_size=batch or len(x), shuffle=True)
        trainer = make_trainer([health, *extra], max_epochs=epochs, **options)
        pl.seed_everything(0, verbose=False)
        trainer.fit(module, data)
        return {each.name: each for each in health.findings}

    return run


def test_a_step_that_is_too_long_is_named_as_the_cause_with_a_rate_that_is_not(judged, lenient):
    found = judged(sgd(mlp(), 60.0), X[:32], ONE_HOT[:32])
    stability = found["stability"]
    assert stability.level == "alert"
    assert stability.value > 1
    assert "times too long for the curvature (step 0)" in stability.sentence
    rate = float(stability.advice.split("at lr ")[1].split(" ")[0])
    calm = judged(sgd(mlp(), rate), X[:32], ONE_HOT[:32])
    assert {each.level for each in calm.values()} <= {"ok", "notice"}
    assert found["not_finite"].level == "alert"
    assert found["not_finite"].step > 1


def test_a_rate_that_is_raised_between_two_measurements_is_named(judged, lenient):
    class Raised(Net):
        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] = 0.5 if self.trainer.global_step < 12 else 60.0

    found = judged(Raised(mlp(), nn.MSELoss(), torch.optim.SGD, lr=0.5), X[:32], ONE_HOT[:32])
    stability = found["stability"]
    assert stability.level == "alert"
    assert "(step 10, and the rate was raised 120-fold after it)" in stability.sentence
    rate = float(stability.advice.split("at lr ")[1].split(" ")[0])
    assert 0.01 < rate < 5.0


def test_one_bad_batch_is_not_put_down_to_the_step(judged, lenient):
    class Scaled(Net):
        def training_step(self, batch, batch_idx):
            factor = 1e5 if self.trainer.global_step == 17 else 1.0
            return self.loss_fn(self(factor * batch[0]), batch[1])

    found = judged(Scaled(mlp(), nn.MSELoss(), torch.optim.SGD, lr=0.5), X[:32], ONE_HOT[:32])
    assert found["stability"].level == "ok"
    assert "the loss leapt" in found["loss_rise"].sentence
    assert "the data" in found["loss_rise"].advice


def test_a_bias_that_batch_norm_removes_does_not_make_the_steps_of_adam_too_long(judged):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    found = judged(Net(net, nn.MSELoss(), torch.optim.AdamW, lr=1e-3), X[:32], ONE_HOT[:32])
    assert found["stability"].level == "ok"
    assert 0 < found["stability"].value < 1  # with the statistics of BatchNorm held constant it was thousands


def test_equal_samples_with_other_labels_are_named_by_their_numbers(judged):
    x, y = X[:16].repeat(2, 1), torch.cat([ONE_HOT[:16], ONE_HOT[:16].roll(1, 1)])
    found = judged(sgd(mlp(), 0.5), x, y, epochs=60)
    assert found["loss_floor"].level in ("notice", "warning")
    assert (
        "Samples 0 and 16 of the probe are equal and have different targets; 16 such pairs"
        in found["loss_floor"].sentence
    )
    assert found["loss_floor"].value == pytest.approx(0.05)


def test_a_width_that_forces_a_loss_is_named_with_the_loss(judged):
    found = judged(sgd(mlp(2), 0.5), X[:32], ONE_HOT[:32], epochs=60)
    assert found["width"].level == "warning"
    assert 0 < found["width"].value <= found["width"].limit


def test_units_that_are_off_and_a_layer_that_is_not_trained_are_named(judged):
    net = mlp()
    nn.init.constant_(net[0].bias, -50.0)
    found = judged(sgd(net, 0.5), X[:32], ONE_HOT[:32])
    assert found["units"].level == "alert"
    assert "All 32 units of net.1 are dead (zero)" in found["units"].sentence
    assert found["layers"].level == "warning"
    assert "net.0" in found["layers"].sentence


def test_a_network_that_is_done_is_not_accused_of_weights_that_do_not_move(judged):
    net, teacher = mlp(), mlp()
    with torch.no_grad():
        targets = teacher(X[:32])
    found = judged(sgd(net, 0.5), X[:32], targets)
    assert found["not_finite"].level == "ok"
    assert "movement" not in found
    assert all(each.level in ("ok", "notice") for each in found.values())


@pytest.mark.parametrize("where", ["input", "loss"])
def test_the_first_value_that_is_not_finite_is_an_alert_at_its_step(judged, lenient, where):
    class Breaks(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if where == "loss" and self.global_step == 3 else loss

    x = X[:32].clone()
    if where == "input":
        x[5, 7] = math.inf
    module = Breaks(mlp(), nn.MSELoss(), torch.optim.SGD, lr=0.1)
    with pytest.warns(UserWarning, match="became"):
        found = judged(
            module, x, ONE_HOT[:32], epochs=6, health=ConvergenceHealth(Probe(8), every_n_steps=2, on_error="warn")
        )
    finding = found["not_finite"]
    assert finding.level == "alert"
    assert f"the {where} became" in finding.sentence
    assert finding.step == (4 if where == "loss" else 1)
    assert bool(finding.advice) == (where == "input")


HEALTHY = {
    "adam": (lambda: Net(mlp(), nn.CrossEntropyLoss(), torch.optim.Adam, lr=1e-3), Y, 16),
    "adamw, batch norm": (
        lambda: Net(
            nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
            nn.CrossEntropyLoss(),
            torch.optim.AdamW,
            lr=1e-2,
        ),
        Y,
        16,
    ),
    "momentum": (lambda: Net(mlp(), nn.MSELoss(), torch.optim.SGD, lr=0.1, momentum=0.9), ONE_HOT, None),
    "descent": (lambda: sgd(mlp(activation=nn.Tanh), 0.05), ONE_HOT, None),
    "random labels": (lambda: Net(mlp(), nn.CrossEntropyLoss(), torch.optim.Adam, lr=1e-3), Y[torch.randperm(64)], 16),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_run_that_is_well_is_accused_of_nothing(judged, name):
    make, y, batch = HEALTHY[name]
    torch.manual_seed(0)
    found = judged(make(), X[:64], y[:64], batch=batch, epochs=15)
    assert {"stability", "units", "not_finite"} <= found.keys()
    assert {each.level for each in found.values()} <= {"ok", "notice"}, [each.sentence for each in found.values()]


def test_what_is_not_known_is_not_judged_and_says_why(judged):
    health = ConvergenceHealth(Probe(32), every_n_steps=5)
    found = judged(sgd(mlp(), 0.1), X[:32], ONE_HOT[:32], health=health, gradient_clip_val=1.0)
    assert "stability" not in found
    assert any("gradients are clipped" in reason for reason in health.not_judged)


def test_an_alert_stops_the_run_or_calls_a_function_once(judged, lenient):
    calls = []
    stopped = ConvergenceHealth(Probe(32), every_n_steps=1, on_alert="stop", on_error="warn")
    called = ConvergenceHealth(Probe(32), every_n_steps=1, on_alert=calls.append, on_error="warn")
    stops, warns = pl.Callback(), pl.Callback()
    for health, extra in ((stopped, stops), (called, warns)):
        judged(sgd(mlp(), 60.0), X[:32], ONE_HOT[:32], health=health, epochs=30, extra=[Count(extra)])
    assert stops.steps < warns.steps == 30
    assert len(calls) == len({each.name for each in calls}) >= 1
    assert all(each.level == "alert" for each in calls)


class Count(pl.Callback):
    """Keeps the number of steps of a run in another object."""

    def __init__(self, into):
        self.into = into

    def on_train_end(self, trainer, pl_module):
        self.into.steps = trainer.global_step


def test_another_answer_to_alerts_is_refused_by_its_value():
    with pytest.raises(MisconfigurationException, match="on_alert='shout' is none of 'warn', 'stop'"):
        ConvergenceHealth(on_alert="shout")
    with pytest.raises(MisconfigurationException, match="audit_labels='yes'; need True or False"):
        ConvergenceHealth(audit_labels="yes")


def test_the_page_says_it_first_and_the_file_has_it(judged, tmp_path):
    report = ConvergenceReport(folder=str(tmp_path))
    health = ConvergenceHealth(Probe(32), every_n_steps=5)
    found = judged(sgd(mlp(), 60.0), X[:32], ONE_HOT[:32], health=health, extra=[report])
    page = (tmp_path / "convergence.md").read_text()
    assert page.index("## In plain words") < page.index("- run: diverged at step")
    assert page.split("\n\n")[2].startswith("- **alert** ")
    stored = json.loads((tmp_path / "convergence.json").read_text())
    assert {each["name"] for each in stored["health"]} == found.keys()
    assert stored["facts"]["run"] == f"diverged at step {found['not_finite'].step}"
    steps = {name.removeprefix("health/"): step for name, step in stored["steps"].items()}
    assert steps.keys() & found.keys()
    assert steps == {name: found[name].step if name in found else health.last_step for name in steps}


def test_scalars_and_text_reach_every_logger_and_the_terminal(judged, recorder, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        found = judged(sgd(mlp(), 0.1), X[:32], ONE_HOT[:32], logger=recorder)
    last = max(recorder.scalars["health/stability"])
    assert recorder.scalars["health/stability"][last] == found["stability"].value > 0
    assert set(recorder.scalars["health/level"].values()) <= {0.0, 1.0}
    assert all(
        math.isfinite(v)
        for name, values in recorder.scalars.items()
        if name.startswith("health/")
        for v in values.values()
    )
    assert "In plain words" in caplog.text
    assert found["stability"].sentence.split(" of its limit")[0] in caplog.text


def test_a_run_that_is_resumed_says_what_the_whole_one_says(make_trainer, tmp_path):
    data = DataLoader(TensorDataset(X[:32], ONE_HOT[:32]), batch_size=16)

    def run(epochs, path=None):
        pl.seed_everything(0, verbose=False)
        health = ConvergenceHealth(Probe(32), every_n_steps=2)
        trainer = make_trainer([health], max_epochs=epochs, checkpoint=True)
        trainer.fit(Net(mlp(), nn.MSELoss(), torch.optim.Adam, lr=1e-2), data, ckpt_path=path)
        return health, trainer

    whole, _ = run(6)
    _, first = run(3)
    resumed, _ = run(6, first.checkpoint_callback.last_model_path or first.checkpoint_callback.best_model_path)
    assert [each.to_json() for each in resumed.findings] == [each.to_json() for each in whole.findings]


def test_the_diagnostics_have_it(judged):
    diagnostics = ConvergenceDiagnostics(Probe(32), every_n_steps=5)
    health = next(each for each in diagnostics.callbacks if isinstance(each, ConvergenceHealth))
    judged(sgd(mlp(), 0.1), X[:32], ONE_HOT[:32], health=health, extra=[])
    assert health.findings


@pytest.mark.parametrize(("optimizer", "said"), [(torch.optim.AdamW, True), (torch.optim.SGD, False)])
def test_a_loss_that_stays_above_its_start_with_adamw_is_a_warning(judged, optimizer, said):
    rate = 2.0 if said else 1e-4
    found = judged(Net(mlp(), nn.CrossEntropyLoss(), optimizer, lr=rate), X[:32], Y[:32].flip(0), batch=8, epochs=30)
    if said:
        assert found["loss_rise"].level == "warning"
        assert "it was never below its start" in found["loss_rise"].sentence
    else:
        assert "loss_rise" not in found
