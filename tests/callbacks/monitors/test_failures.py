"""After a failed measurement nothing reads an old number: it is NaN until the next one, said once, and named in the report."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceReport, ExpressivityGuard, KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.monitors import base
from lightning_conv.callbacks.run import schedule
from lightning_conv.callbacks.run.guarded import Failures
from lightning_conv.callbacks.run.measurement import Measurement


class Watch(pl.Callback):
    """What others read at the end of every batch."""

    def __init__(self, tag):
        self.tag, self.seen = tag, []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(float(trainer.callback_metrics.get(self.tag, math.inf)))


@pytest.fixture
def fit(make_trainer, make_regression):
    """A run whose weights are NaN from step 4 to step 6."""

    def run(callbacks, epochs=9, **options):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        module, kept = make_regression(network, lr=0.01), {}

        class Break(pl.Callback):
            def on_train_batch_start(self, trainer, *args):
                if trainer.global_step == 3:
                    kept.update({name: value.clone() for name, value in network.state_dict().items()})
                    with torch.no_grad():
                        network[0].weight.fill_(float("nan"))
                if trainer.global_step == 6:
                    network.load_state_dict(kept)

        trainer = make_trainer([Break(), *callbacks], max_epochs=epochs, **options)
        data = TensorDataset(torch.randn(8, 4), torch.randn(8, 1))
        trainer.fit(module, DataLoader(data, batch_size=8))
        return trainer

    return run


def test_the_number_is_nan_until_the_next_measurement_and_loggers_keep_what_they_have(fit, recorder, tmp_path, lenient):
    monitor, report = LambdaMin(8, every_n_steps=1), ConvergenceReport(folder=tmp_path)
    watch = Watch("kernel/lambda_min")
    with pytest.warns(UserWarning, match="LambdaMin: no measurement at step 4") as said:
        fit([monitor, watch, report], logger=recorder)
    assert [math.isnan(value) for value in watch.seen] == [step in (4, 5, 6) for step in range(1, 10)]
    assert monitor.failed == [4, 5, 6]
    assert sum("LambdaMin: no measurement" in str(each.message) for each in said) == 1
    logged = recorder.scalars["kernel/lambda_min"]
    assert set(logged) == {0, 1, 2, 3, 7, 8, 9}
    assert all(math.isfinite(value) for value in logged.values())
    assert "LambdaMin: no measurement at 3 steps, first at step 4: " in (tmp_path / "convergence.md").read_text()


def test_early_stopping_that_would_end_the_run_is_named_before_it_begins(fit, lenient):
    stopping = EarlyStopping("kernel/lambda_min", patience=100, check_on_train_epoch_end=True)
    with pytest.warns(
        UserWarning, match=r"EarlyStopping\(monitor='kernel/lambda_min', check_finite=True\) ends the run"
    ):
        trainer = fit([LambdaMin(8, every_n_steps=1), stopping])
    assert trainer.global_step == 4
    patient = EarlyStopping("kernel/lambda_min", patience=100, check_on_train_epoch_end=True, check_finite=False)
    assert fit([LambdaMin(8, every_n_steps=1), patient]).global_step == 9


def test_failed_measurements_are_charged_to_the_budget(fit, monkeypatch, lenient):
    monitor = KernelStability(8)
    spent = []
    monkeypatch.setattr(type(monitor._schedule), "spend", lambda self, step, seconds: spent.append(step))
    monkeypatch.setattr(type(monitor._schedule), "due", lambda self, step: True)
    fit([monitor])
    assert {4, 5, 6} <= set(spent)


def test_a_run_that_is_nan_from_step_20_on_makes_few_attempts_and_says_it_once(
    make_trainer, make_regression, tmp_path, monkeypatch, lenient
):
    clock, attempts = [0.0], []

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            clock[0] += 0.01  # a step takes that long, and so does a measurement, whether it fails or not
            if trainer.global_step == 20:
                with torch.no_grad():
                    next(pl_module.parameters()).fill_(float("nan"))

    compute = Measurement._compute

    def counted(self):
        attempts.append(self._trainer.global_step)
        clock[0] += 0.01
        return 0.01, *compute(self)[1:]

    monkeypatch.setattr(Measurement, "_compute", counted)
    for module in (schedule, base):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=lambda: clock[0]))
    monitors = [KernelStability(Probe(size=8, outputs="trace")), LambdaMin(Probe(size=8, outputs="trace"))]
    trainer = make_trainer([Break(), *monitors, ConvergenceReport(folder=tmp_path)], max_epochs=200)
    data = TensorDataset(torch.randn(24, 4), torch.randn(24, 1))
    with pytest.warns(UserWarning, match="no measurement at step") as said:
        trainer.fit(
            make_regression(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), lr=1e-3),
            DataLoader(data, batch_size=8),
        )
    assert trainer.global_step == 600
    failed = [step for step in attempts if step > 20]
    assert len(failed) >= 2 * 3  # both monitors try
    assert 0.01 * len(failed) <= 0.03 * clock[0] + 0.02  # those of the last step are beside it
    gaps = [b - a for a, b in zip(sorted(set(failed)), sorted(set(failed))[1:-1], strict=False)]
    assert gaps == sorted(gaps)  # ever longer pauses
    assert sum("no measurement" in str(each.message) for each in said) == 1
    page = (tmp_path / "convergence.md").read_text()
    steps = len(monitors[0].failed)
    assert f"KernelStability, LambdaMin: no measurement at {steps} steps, first at step {min(failed)}: " in page


def test_a_training_loss_that_cannot_be_measured_is_nan(make_trainer, make_module, make_loader, monkeypatch, lenient):
    guard, watch = ExpressivityGuard(switch_at=4), Watch("convergence/gap")

    class Fail(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                monkeypatch.setattr(guard._run._phase_two.rule.steps, "measure", lambda: 1 / 0)

    make_trainer([guard, watch, Fail()], max_epochs=5).fit(make_module(dropout=0.0), make_loader())
    assert math.isnan(watch.seen[-1])
    assert any(math.isfinite(value) for value in watch.seen)


def test_failures_are_the_same_if_only_their_numbers_differ():
    failures = Failures()
    assert failures.note("LambdaMin: no measurement", 20, "changes by 0.25 of 3e-7")
    assert not failures.note("KernelStability: no measurement", 20, "changes by 0.5 of 1e+12")
    assert not failures.note("LambdaMin: no measurement", 31, "changes by 7 of 2")
    assert failures.note("LambdaMin: no measurement", 31, "the inputs contain NaN")
    assert failures.note("ConvergenceCriteria, du: its measurement is left out", None, "division by zero")
    assert not failures.note("ConvergenceCriteria, du: its measurement is left out", None, "division by zero")
    assert failures.words == [
        "LambdaMin, KernelStability: no measurement at 2 steps, first at step 20: changes by 0.25 of 3e-7",
        "LambdaMin: no measurement at step 31: the inputs contain NaN",
        "ConvergenceCriteria, du: its measurement is left out 2 times: division by zero",
    ]
