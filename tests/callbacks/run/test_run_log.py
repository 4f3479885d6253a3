"""What a run writes for TensorBoard: charts that are not empty, no constant, no repeated tag, settings and the link."""

import itertools
import logging
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import (
    ConvergenceDiagnostics,
    ExpressivityGuard,
    KernelStability,
    LambdaMin,
    Probe,
    RegularizedGradientClipping,
)
from lightning_conv.callbacks.run.tensorboard import ADDRESS, UNTICK
from lightning_conv.reporting.charts import HEADLINES, LIMITS
from lightning_conv.reporting.tags import GROUPS

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
VALUES, CLASSES = X[:, :2] ** 2, (X[:, 0] > 0).long()


class Net(pl.LightningModule):
    """Logs its loss of training and of validation."""

    def __init__(self, classes=False, optimizer="SGD", lr=0.05, secret_token="x"):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 30), nn.Softplus(), nn.Linear(30, 2))
        self.loss = F.cross_entropy if classes else F.mse_loss

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return getattr(torch.optim, self.hparams.optimizer)(self.net.parameters(), lr=self.hparams.lr)


class Pair(pl.LightningModule):
    """Two networks with an optimizer each; logs nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(6, 2), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.one, self.two)]


def data(classes=False, batch=12):
    return DataLoader(TensorDataset(X, CLASSES if classes else VALUES), batch_size=batch)


def diagnostics(outputs="trace"):
    return ConvergenceDiagnostics(Probe(size=24, outputs=outputs), every_n_steps=2)


def pair(*callbacks):
    return lambda: (Pair(), list(callbacks))


RUNS = {
    "squared loss": lambda: (Net(), [diagnostics("full")]),
    "whole batches": lambda: (Net(), [diagnostics("full")]),
    "classes": lambda: (Net(classes=True, optimizer="AdamW"), [diagnostics()]),
    "loss kernel": lambda: (Net(classes=True), [diagnostics("loss")]),
    "guard": lambda: (Net(classes=True), [diagnostics(), ExpressivityGuard(switch_at=6)]),
    "certified steps": lambda: (Net(), [ExpressivityGuard(switch_at=2, step_rule="certified")]),
    "guard alone": lambda: (Net(), [ExpressivityGuard(switch_at=4)]),
    "bound": lambda: (
        Net(),
        [LambdaMin(24, every_n_steps=2, bound="last block"), KernelStability(24, every_n_steps=2)],
    ),
    "clipping": lambda: (Net(), [RegularizedGradientClipping(gamma=1.0, delta=0.5), LambdaMin(24, every_n_steps=2)]),
    "two networks": lambda: (Pair(), [diagnostics()]),
}


def fit(make_trainer, folder, name, epochs=8, version=None):
    module, callbacks = RUNS[name]()
    logger = TensorBoardLogger(folder, name="", version=version, default_hp_metric=False)
    trainer = make_trainer(callbacks, max_epochs=epochs, logger=logger, log_every_n_steps=1)
    classes = getattr(module, "loss", None) is F.cross_entropy
    whole = name in ("whole batches", "certified steps")
    trainer.fit(module, data(classes, 24 if whole else 12), None if isinstance(module, Pair) else data(classes, 24))
    return trainer


def events(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def curves(folder):
    """Return the points of each tag of a folder; a run without limits has no folder of them."""
    if not Path(folder).is_dir():
        return {}
    found = events(folder)
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def charts_of(folder):
    content = events(folder).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    return {each.title: each for category in Layout.FromString(content).category for each in category.chart}


def settings_of(folder, tag="session_start_info"):
    content = events(folder).summary_metadata[f"_hparams_/{tag}"].plugin_data.content
    return getattr(HParamsPluginData.FromString(content), tag)


@pytest.mark.parametrize("name", RUNS)
def test_every_chart_shows_something_and_no_tag_is_constant_or_that_of_another(make_trainer, tmp_path, name):
    trainer = fit(make_trainer, tmp_path, name)
    folder = Path(trainer.logger.log_dir)
    found, limits = curves(folder), curves(folder / LIMITS)
    charts = charts_of(folder)
    assert charts
    for title, chart in charts.items():
        assert not chart.HasField("margin")
        lines = {tag for tag in {*found, *limits} for line in chart.multiline.tag if re.match(line, tag)}
        assert 1 <= len(lines) <= 4, title
        assert any(line in found or "log10" in line for line in lines), title
        assert all(len({**limits, **found}[line]) > 0 for line in lines)
    known = {tag: points for tag, points in found.items() if tag.startswith(GROUPS)}
    constant = [tag for tag, points in known.items() if len(points) > 1 and len({value for _, value in points}) == 1]
    assert constant == []
    assert not set(found) & set(events(folder).Tags()["images"])  # TensorBoard has one kind of data for a tag
    alike = [(a, b) for a in known for b in known if a < b and known[a] == known[b] and len(known[a]) > 1]
    assert alike == []
    shown = {tag for chart in charts.values() for tag in found for line in chart.multiline.tag if re.match(line, tag)}
    assert {tag for tag in found if tag in HEADLINES and "log10" in tag} <= shown


def test_the_first_charts_are_those_of_the_run(make_trainer, tmp_path):
    titles = list(charts_of(fit(make_trainer, tmp_path, "guard").logger.log_dir))
    assert titles[:2] == ["loss", "stability ratio (edge at 1)"]
    assert "log10 of the gap to the global infimum (phase 2), and its proven bound" in titles
    assert not any("step size" in title for title in titles)  # there is none of cross-entropy
    loss = charts_of(tmp_path / "version_0")["loss"].multiline.tag
    assert loss[:2] == ["train_loss_epoch$", "val_loss$"]


def test_callback_metrics_keep_everything(make_trainer, tmp_path):
    trainer = fit(make_trainer, tmp_path, "guard")
    metrics = trainer.callback_metrics
    for headline, tag in {"lambda_min": "kernel/lambda_min", "phase": "guard/phase", "gap": "guard/gap"}.items():
        assert metrics[f"convergence/{headline}"] == metrics[tag]
    assert {"guard/loss", "health/level", "theory/separation", "kernel/precision"} <= set(metrics)
    assert not {tag for tag in curves(trainer.logger.log_dir) if tag in ("guard/loss", "convergence/gap")}


def test_constants_are_settings_and_runs_are_compared_by_metrics(make_trainer, tmp_path):
    runs = [fit(make_trainer, tmp_path, name) for name in ("classes", "squared loss")]
    for trainer, optimizer in zip(runs, ("AdamW", "SGD"), strict=True):
        folder = trainer.logger.log_dir
        start, experiment = settings_of(folder), settings_of(folder, "experiment")
        own = {"classes", "optimizer", "lr", "secret_token"}
        assert own <= set(start.hparams)
        assert start.hparams["optimizer"].string_value == optimizer
        assert start.hparams["secret_token"].string_value != "x"
        separation = trainer.callback_metrics["theory/separation"]
        assert start.hparams["theory/separation"].number_value == pytest.approx(float(separation))
        assert not set(start.hparams) & set(curves(folder)) - HEADLINES
        assert {info.name for info in experiment.hparam_infos if info.differs} == own
        metrics = [info.name.tag for info in experiment.metric_infos]
        assert (
            "health/level" in metrics
        )  # whether it changes or not: otherwise healthy runs could not be compared with sick ones
        assert not set(start.hparams) & set(metrics)
        assert metrics[:2] == ["val_loss", "train_loss_epoch"]
        assert "kernel/lambda_min" in metrics
        assert set(metrics) <= set(curves(folder))
        assert settings_of(folder, "session_end_info").status == 1  # of success
        assert trainer.logger.hparams == dict(trainer.lightning_module.hparams)  # as the user's module has them


def test_settings_that_the_module_logs_with_metrics_stay(make_trainer, tmp_path):
    class Own(Net):
        def on_train_start(self):
            self.logger.log_hyperparams({"mine": 3}, {"final": 0.5})

    trainer = make_trainer([diagnostics()], max_epochs=1, logger=TensorBoardLogger(tmp_path, default_hp_metric=False))
    trainer.fit(Own(), data(), data())
    assert set(settings_of(trainer.logger.log_dir).hparams) == {"mine"}
    assert [info.name.tag for info in settings_of(trainer.logger.log_dir, "experiment").metric_infos] == ["final"]


def test_a_run_that_fails_has_its_settings_and_says_so(make_trainer, tmp_path):
    class Failing(Net):
        def on_train_epoch_end(self):
            raise RuntimeError("no")

    trainer = make_trainer([diagnostics()], max_epochs=2, logger=TensorBoardLogger(tmp_path, default_hp_metric=False))
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit(Failing(), data())
    assert settings_of(trainer.logger.log_dir, "session_end_info").status == 2
    assert "lr" in settings_of(trainer.logger.log_dir).hparams


def test_a_board_that_cannot_be_written_does_not_end_the_run(make_trainer, tmp_path, monkeypatch):
    class Full(TensorBoardLogger):
        full = False

        @property
        def experiment(self):
            self.refuse()
            return super().experiment

        def log_metrics(self, metrics, step=None):
            self.refuse()

        def refuse(self):
            if self.full:
                raise OSError("no space left on device")

    class Filling(Net):
        log = staticmethod(lambda *args, **kwargs: None)

        def setup(self, stage):
            self.trainer.logger.full = True

        def teardown(self, stage):
            self.trainer.logger.full = False

    logger = Full(tmp_path, default_hp_metric=False)
    monkeypatch.setattr(logger, "save", lambda: None)
    trainer = make_trainer([KernelStability(24, every_n_steps=2)], max_epochs=2, logger=logger)
    with pytest.warns(UserWarning, match="something is not logged"):
        trainer.fit(Filling(), data())
    assert trainer.state.finished
    assert "kernel/alignment" in trainer.callback_metrics


def test_other_loggers_get_every_value_but_no_repeated_tag(make_trainer, tmp_path, recorder):
    loggers = [recorder, TensorBoardLogger(tmp_path, default_hp_metric=False)]
    trainer = make_trainer([diagnostics()], max_epochs=4, logger=loggers)
    trainer.fit(Net(), data(), data())
    steps = set(recorder.scalars["kernel/lambda_min"])
    assert len(steps) > 2
    assert set(recorder.scalars["kernel/precision"]) == steps
    assert set(recorder.scalars["theory/separation"]) == {0}
    assert not any(tag.startswith("convergence/") for tag in recorder.scalars)
    for tag, points in curves(loggers[1].log_dir).items():
        if tag.startswith(GROUPS) and "log10" not in tag:
            known = recorder.scalars[tag]
            assert all(known[step] == pytest.approx(value, rel=1e-5) for step, value in points), tag


def test_a_second_fit_of_the_same_callbacks_has_its_own_charts_and_settings(make_trainer, tmp_path):
    callbacks = [diagnostics()]
    for _ in range(2):
        logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
        trainer = make_trainer(callbacks, max_epochs=2, logger=logger)
        trainer.fit(Net(), data(), data())
        assert "loss" in charts_of(logger.log_dir)
        assert "theory/separation" in settings_of(logger.log_dir).hparams


def test_a_value_that_changes_late_has_its_past(make_trainer, tmp_path):
    trainer = fit(make_trainer, tmp_path, "guard alone")
    phase = curves(trainer.logger.log_dir)["guard/phase"]
    assert phase[0] == (0, 1.0)
    assert phase[-1] == (trainer.global_step, 2.0)


def test_the_link_to_the_charts_is_said_at_the_start_and_at_the_end(make_trainer, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def said(**options):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            make_trainer([diagnostics(), ExpressivityGuard(switch_at=1)], **{"max_epochs": 1, **options}).fit(
                Net(), data()
            )
        return [each.message for each in caplog.records if ADDRESS in each.message]

    lines = said(logger=TensorBoardLogger("my runs", name="net"))
    assert lines == [f"Charts: tensorboard --logdir 'my runs/net', then {ADDRESS} ({UNTICK})"] * 2
    assert said(logger=TensorBoardLogger("my runs"), fast_dev_run=True) == []
    assert said(logger=False) == []
    assert said(logger=CSVLogger("table")) == []


def test_texts_begin_with_health_have_narrow_tables_and_follow_the_numbers(make_trainer, tmp_path):
    callbacks = [
        ConvergenceDiagnostics(Probe(size=24), every_n_steps=2, audit_labels=True),
        ExpressivityGuard(switch_at=6),
    ]
    trainer = make_trainer(callbacks, max_epochs=5, logger=TensorBoardLogger(tmp_path))
    trainer.fit(Net(classes=True), data(classes=True))
    found = events(trainer.logger.log_dir)
    tags = sorted(tag for tag in found.Tags()["tensors"] if tag.endswith("/text_summary"))
    assert tags[0] == "convergence/health/text_summary"
    assert {f"{tag}/text_summary" for tag in ("theory/criteria", "kernel/layers", "guard/reason")} <= set(tags)
    for tag in tags:
        for event in found.Tensors(tag):
            lines = event.tensor_proto.string_val[0].decode().splitlines()
            assert not any(line.startswith((" ", "\t")) for line in lines)
            cells = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines if line.startswith("|")]
            assert max(cells, default=0) <= 4, tag
    for tag in ("convergence/health", "theory/criteria", "kernel/layers"):
        written = found.Tensors(f"{tag}/text_summary")
        said = [each.tensor_proto.string_val[0].decode().split("\n", 1)[-1] for each in written]
        assert len(said) > 2
        assert all(before != after for before, after in itertools.pairwise(said)), tag
