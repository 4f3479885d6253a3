"""What a run logs is kept for its page, on rank zero, in bounded memory, and across checkpoints."""

import math

import lightning.pytorch as pl
import pytest
import torch

from lightning_conv.callbacks import ConvergenceDiagnostics, ConvergenceReport, LambdaMin
from lightning_conv.callbacks import report as report_file
from lightning_conv.callbacks.health.losses_seen import LossesSeen
from lightning_conv.callbacks.run.callbacks import callbacks_of
from lightning_conv.callbacks.run.logging import log_metrics, withdraw
from lightning_conv.callbacks.run.series_keeper import MOST_SERIES


class Validates(pl.Callback):
    """Logs a value of each validation, as a module does."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("epoch_value", float(trainer.current_epoch))


def kept(trainer):
    (report,) = callbacks_of(trainer, ConvergenceReport)
    return report


def as_points(series):
    return dict(zip(series.steps, series.values, strict=True))


def test_what_loggers_get_is_kept_by_step(tmp_path, make_trainer, make_module, make_loader, recorder):
    report = ConvergenceReport(folder=str(tmp_path))
    trainer = make_trainer([LambdaMin(32, every_n_steps=2), report], max_epochs=2, logger=recorder)
    trainer.fit(make_module(), make_loader())
    logged = {tag: dict(values) for tag, values in recorder.scalars.items() if tag.startswith("kernel/")}
    assert logged
    for tag, values in logged.items():
        assert as_points(report.series[tag]) == pytest.approx(values), tag
    assert sum(report.shares[""].values()) == pytest.approx(1.0)


def test_the_values_of_the_module_are_kept_once_when_an_epoch_ends(tmp_path, make_trainer, make_module, make_loader):
    report = ConvergenceReport(folder=str(tmp_path))
    trainer = make_trainer([Validates(), report], max_epochs=3)
    trainer.fit(make_module(), make_loader())
    assert as_points(report.series["epoch_value"]) == {3: 0.0, 6: 1.0, 9: 2.0}
    losses = trainer.lightning_module.losses
    assert as_points(report.series["train_loss"]) == pytest.approx({3: losses[2], 6: losses[5], 9: losses[8]})


def test_the_loss_of_every_step_is_kept(monkeypatch, tmp_path, make_trainer, make_module, make_loader):
    trainer = make_trainer([ConvergenceDiagnostics(32, every_n_steps=4)], max_epochs=3)
    kept_losses = []
    report = ConvergenceReport(folder=str(tmp_path))
    write = report_file.record_of

    def record(*args):
        found = write(*args)
        kept_losses.append(found.series["loss"])
        return found

    monkeypatch.setattr(report_file, "record_of", record)
    trainer.callbacks.append(report)
    trainer.fit(make_module(), make_loader())
    assert kept_losses[0].steps == list(range(1, 10))
    assert kept_losses[0].values == pytest.approx(trainer.lightning_module.losses)


def test_a_resumed_run_has_what_the_uninterrupted_one_has(tmp_path, make_trainer, make_module, make_loader):
    def trained(epochs, ckpt=None, **options):
        trainer = make_trainer([ConvergenceDiagnostics(32, every_n_steps=2)], max_epochs=epochs, **options)
        trainer.fit(make_module(dropout=0.0), make_loader(), ckpt_path=ckpt)
        return trainer

    whole = trained(4)
    trained(2, checkpoint=True)
    resumed = trained(4, ckpt=str(tmp_path / "checkpoints" / "last.ckpt"))
    first, second = kept(whole), kept(resumed)
    tags = {"kernel/lambda_min", "kernel/alignment", "theory/loss", "train_loss"}
    assert tags <= first.series.keys()
    for tag in tags:
        assert second.series[tag].steps == first.series[tag].steps, tag
        assert second.series[tag].values == pytest.approx(first.series[tag].values, rel=1e-4, nan_ok=True), tag


def test_another_run_begins_anew(tmp_path, make_trainer, make_module, make_loader):
    report = ConvergenceReport(folder=str(tmp_path))
    for epochs in (3, 1):
        make_trainer([LambdaMin(32, every_n_steps=2), report], max_epochs=epochs).fit(make_module(), make_loader())
    assert max(report.series["kernel/lambda_min"].steps) == 3


def test_a_measurement_that_failed_is_a_gap(tmp_path, make_trainer):
    report = ConvergenceReport(folder=str(tmp_path))
    trainer = make_trainer([report])
    log_metrics(trainer, {"kernel/lambda_min": 1.0, "kernel/never": math.nan}, 0)
    withdraw(trainer, ["kernel/lambda_min"])
    assert math.isnan(report.series["kernel/lambda_min"].last)
    assert "kernel/never" not in report.series


def test_the_number_of_quantities_is_bounded(tmp_path, make_trainer):
    report = ConvergenceReport(folder=str(tmp_path))
    log_metrics(make_trainer([report]), {f"kernel/{k}": 1.0 for k in range(2 * MOST_SERIES)}, 0)
    assert len(report.series) == MOST_SERIES


def test_losses_survive_a_checkpoint_and_end_at_one_that_is_not_finite():
    losses, again = LossesSeen(), LossesSeen()
    for value in (3.0, 2.0, 1.0):
        losses.note(torch.tensor(value))
    losses.fetch(3)
    again.load_state_dict(losses.state_dict())
    again.note(torch.tensor(0.5))
    assert again.note(torch.tensor(math.nan))
    again.fetch(5)
    assert again.series.steps == [1, 2, 3, 4, 5]
    assert again.series.values[:4] == [3.0, 2.0, 1.0, 0.5]
    assert math.isnan(again.series.last)
    again.load_state_dict({name: value for name, value in losses.state_dict().items() if name != "series"})
    assert not len(again.series)  # a checkpoint of an earlier version
