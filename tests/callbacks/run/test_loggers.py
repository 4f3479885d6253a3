"""What people's loggers have of a run, read back with the readers of their own packages, without a network."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import comet_ml
import mlflow
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from lightning_conv.callbacks import ConvergenceDiagnostics, ConvergenceReport, LambdaMin
from lightning_conv.callbacks.run.guarded import set_strict
from lightning_conv.callbacks.run.logging import log_figure, log_metrics, log_text
from lightning_conv.recipes.cli import main

FILES = ["convergence.html", "convergence.json", "convergence.md", "convergence.png"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No package asks a server, and none writes outside of the test's folder; whoever tries to connect fails the test."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "COMET_START_ONLINE": "0",
        "COMET_LOGGING_CONSOLE": "error",
    }.items():
        monkeypatch.setenv(name, value)
    tried = []
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError(f"the tests have no network: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.chdir(tmp_path)
    yield
    wandb.finish()
    assert not tried


@pytest.fixture
def fit(make_trainer, make_module, make_loader):
    """Train the small network and return the trainer; ``callbacks`` are ours unless others are given."""

    def run(logger, epochs=2, callbacks=None, **options):
        callbacks = callbacks or [ConvergenceDiagnostics(16, every_n_steps=2)]
        trainer = make_trainer(callbacks, max_epochs=epochs, logger=logger, **options)
        trainer.fit(make_module(), make_loader(), ckpt_path=options.pop("ckpt_path", None))
        return trainer

    return run


def mlflow_logger(folder, experiment="digits", **options):
    folder.mkdir(exist_ok=True)
    return MLFlowLogger(
        experiment, tracking_uri=f"sqlite:///{folder}/runs.db", artifact_location=f"{folder}/artifacts", **options
    )


def wandb_records(folder):
    """Every record of the offline runs below a folder, in order, as their own reader gives them."""
    for path in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            yield Record.FromString(data)


def wandb_history(folder):
    """The rows of the history, each a dict by key."""
    for record in wandb_records(folder):
        if record.HasField("history"):
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def one(paths):
    (found,) = paths
    return found


def is_picture(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and min(picture.size) > 100 and len(set(picture.convert("L").getdata())) > 10


def test_wandb_has_scalars_figures_texts_and_the_page_of_its_run(fit, tmp_path, capfd):
    logger = WandbLogger(project="digits", save_dir=tmp_path, offline=True)
    trainer = fit(logger)
    wandb.finish()
    folder = tmp_path / "digits" / logger.version
    assert sorted(path.name for path in folder.iterdir()) == FILES
    rows = list(wandb_history(tmp_path))
    measured = {row["trainer/global_step"]: row["kernel/lambda_min"] for row in rows if "kernel/lambda_min" in row}
    series = json.loads((folder / "convergence.json").read_text())["series"]["kernel/lambda_min"]
    assert list(measured) == series["steps"] == [0, 2, 4, 6]
    assert list(measured.values()) == pytest.approx(series["values"], rel=1e-5)
    assert measured[6] == pytest.approx(float(trainer.callback_metrics["kernel/lambda_min"]), rel=1e-6)
    files = one(tmp_path.glob("wandb/offline-run-*/files"))
    for name in FILES:
        assert (files / name).read_bytes() == (folder / name).read_bytes()
    images = [(row["trainer/global_step"], row["kernel/spectrum"]) for row in rows if "kernel/spectrum" in row]
    assert images[0][0] == 0
    assert all(is_picture(files / each["filenames"][0]) for _, each in images)
    words = [row["health/words"] for row in rows if "health/words" in row]
    table = json.loads((files / words[-1]["path"]).read_text())
    assert table["columns"] == ["step", "text"]
    assert "loss" in table["data"][0][1]
    page = one(row["convergence/page"] for row in rows if "convergence/page" in row)
    assert (files / page["path"]).read_text("utf-8") == (folder / "convergence.html").read_text("utf-8")
    said = capfd.readouterr()
    assert "WARNING" not in said.err.replace("The anonymous setting has no effect", "")
    assert "less than current step" not in said.err + said.out


def test_mlflow_has_scalars_figures_texts_and_the_page_of_its_run(fit, tmp_path):
    logger = mlflow_logger(tmp_path / "store")
    trainer = fit(logger)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/store/runs.db")
    run = one(client.search_runs([logger.experiment_id]))
    assert run.info.status == "FINISHED"
    values = client.get_metric_history(run.info.run_id, "kernel/lambda_min")
    assert [each.step for each in values] == [0, 2, 4, 6]
    assert values[-1].value == pytest.approx(float(trainer.callback_metrics["kernel/lambda_min"]), rel=1e-6)
    kept = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, dst_path=str(tmp_path / "down"), tracking_uri=f"sqlite:///{tmp_path}/store/runs.db"
    )
    ours = Path(kept) / "convergence"
    folder = tmp_path / str(logger.experiment_id) / run.info.run_id
    for name in FILES:
        assert (ours / name).read_bytes() == (folder / name).read_bytes()
    assert is_picture(ours / "figures" / "kernel" / "spectrum.png")
    assert is_picture(ours / "convergence.png")
    assert (ours / "texts" / "health" / "words.md").read_text("utf-8").startswith("*Step ")


def test_mlflow_with_folders_keeps_the_report_with_its_run(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("digits", save_dir=str(tmp_path / "mlruns"))
    fit(logger, epochs=1)
    folder = tmp_path / "mlruns" / str(logger.experiment_id) / logger.run_id
    assert {*FILES, "meta.yaml", "metrics"} <= {path.name for path in folder.iterdir()}
    assert (folder / "artifacts" / "convergence" / "convergence.html").is_file()


def test_comet_has_scalars_figures_texts_and_the_page_of_its_run(fit, tmp_path):
    logger = CometLogger(api_key="none", project="digits", offline_directory=str(tmp_path / "comet"))
    fit(logger, epochs=1)
    folder = tmp_path / "comet" / "digits" / logger.version
    assert sorted(path.name for path in folder.iterdir()) == FILES
    logger.experiment.end()
    with zipfile.ZipFile(one((tmp_path / "comet").glob("*.zip"))) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
        sent = [each["payload"] for each in messages]
        scalars = {each["metric"]["metricName"] for each in sent if isinstance(each.get("metric"), dict)}
        assert {"kernel/lambda_min", "theory/loss"} <= scalars
        uploads = {each["additional_params"].get("fileName"): each for each in sent if "additional_params" in each}
        assert {f"convergence/{name}" for name in FILES} <= uploads.keys()
        assert "convergence/texts/health/words.md" in uploads
        assert "kernel/spectrum" in {each["additional_params"].get("figName") for each in uploads.values()}


def test_csv_has_pictures_and_texts_beside_its_table(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="digits")
    fit(logger)
    folder = Path(logger.log_dir)
    assert {*FILES, "metrics.csv"} <= {path.name for path in folder.iterdir()}
    assert is_picture(folder / "convergence.png")
    assert is_picture(folder / "figures" / "kernel" / "spectrum.png")
    text = (folder / "texts" / "health" / "words.md").read_text("utf-8")
    assert text.startswith("*Step ")
    assert "loss" in text


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_two_runs_of_a_project_keep_their_reports(fit, tmp_path, kind):
    folders, pages = [], []
    for epochs in (1, 2):
        if kind == "wandb":
            logger = WandbLogger(project="digits", save_dir=tmp_path, offline=True)
        else:
            logger = mlflow_logger(tmp_path / "store")
        report = ConvergenceReport()
        trainer = fit(logger, epochs, [LambdaMin(16, every_n_steps=2), report])
        wandb.finish()
        folders.append(report.folder_of(trainer))
        pages.append((folders[-1] / "convergence.html").read_bytes())
    assert folders[0] != folders[1]
    assert [(folder / "convergence.html").read_bytes() for folder in folders] == pages
    ends = [json.loads((each / "convergence.json").read_text())["facts"]["optimizer steps"] for each in folders]
    assert ends == [3, 6]


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_resumed_run_goes_on_in_its_folder_with_its_charts(fit, tmp_path, kind):
    def logger(known=None):
        if kind == "wandb":
            return WandbLogger(project="digits", save_dir=tmp_path, offline=True, id=known)
        return mlflow_logger(tmp_path / "store", run_id=known)

    first = logger()
    trainer = fit(first, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    known = first.version
    wandb.finish()
    report = ConvergenceReport()
    again = logger(known)
    callbacks = [ConvergenceDiagnostics(16, every_n_steps=2)]
    trainer = fit(again, 2, callbacks, ckpt_path=tmp_path / "last.ckpt")
    assert again.version == known
    wandb.finish()
    (report,) = (each for each in callbacks[0].members if isinstance(each, ConvergenceReport))
    stored = json.loads((report.folder_of(trainer) / "convergence.json").read_text())
    assert stored["series"]["kernel/lambda_min"]["steps"] == [0, 2, 3, 4, 6]
    assert len([*tmp_path.rglob("convergence.json")]) == (1 + 2 * (kind == "wandb") + (kind == "mlflow"))


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_the_page_is_made_again_where_only_this_logger_was_used(fit, tmp_path, kind):
    logger = WandbLogger(save_dir=tmp_path, offline=True) if kind == "wandb" else mlflow_logger(tmp_path / "store")
    report = ConvergenceReport()
    trainer = fit(logger, 2, [LambdaMin(16, every_n_steps=2), report])
    folder = report.folder_of(trainer)
    before = (folder / "convergence.html").read_text("utf-8")
    (folder / "convergence.html").unlink()
    assert main(["report", str(folder)]) == 0
    after = (folder / "convergence.html").read_text("utf-8")
    charts = [page.partition('id="data-charts">')[2].partition("</script>")[0] for page in (before, after)]
    assert charts[0] == charts[1]
    assert "lambda_min" in charts[0]


def test_three_loggers_at_once_have_the_same_run(fit, tmp_path):
    board, rows = TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="rows")
    store, panels = mlflow_logger(tmp_path / "store"), WandbLogger(save_dir=tmp_path, offline=True)
    report = ConvergenceReport()
    trainer = fit([store, panels, rows, board], 2, [LambdaMin(16, every_n_steps=2), report])
    wandb.finish()
    assert report.folder_of(trainer) == Path(rows.log_dir)  # the first one with a folder of its own
    page = (Path(rows.log_dir) / "convergence.html").read_bytes()
    assert (Path(board.log_dir) / "convergence.html").read_bytes() == page
    artifacts = Path(store.experiment.get_run(store.run_id).info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "convergence" / "convergence.html").read_bytes() == page
    assert one(tmp_path.glob("wandb/offline-run-*/files/convergence.html")).read_bytes() == page
    events = EventAccumulator(board.log_dir).Reload()
    of_board = [(each.step, each.value) for each in events.Scalars("kernel/lambda_min")]
    of_store = [
        (each.step, each.value) for each in store.experiment.get_metric_history(store.run_id, "kernel/lambda_min")
    ]
    of_panels = [
        (row["trainer/global_step"], row["kernel/lambda_min"])
        for row in wandb_history(tmp_path)
        if "kernel/lambda_min" in row
    ]
    assert [step for step, _ in of_board] == [0, 2, 4, 6]
    assert of_store == of_panels
    assert [value for _, value in of_store] == pytest.approx([value for _, value in of_board], rel=1e-6)
    assert "kernel/spectrum" in events.Tags()["images"]
    assert is_picture(artifacts / "convergence" / "figures" / "kernel" / "spectrum.png")
    assert is_picture(Path(rows.log_dir) / "figures" / "kernel" / "spectrum.png")


BROKEN = [
    (WandbLogger, "log_metrics"),
    (WandbLogger, "log_image"),
    (WandbLogger, "log_text"),
    (wandb.sdk.wandb_run.Run, "save"),
    (MLFlowLogger, "log_metrics"),
    (mlflow.MlflowClient, "log_figure"),
    (mlflow.MlflowClient, "log_text"),
    (mlflow.MlflowClient, "log_artifact"),
]


@pytest.mark.parametrize(("owner", "method"), BROKEN, ids=lambda each: getattr(each, "__name__", each))
def test_a_logger_that_raises_is_said_once_and_the_run_goes_on(fit, tmp_path, monkeypatch, recwarn, owner, method):
    def fails(*args, **kwargs):
        raise RuntimeError("no connection, attempt 17")

    monkeypatch.setattr(owner, method, fails)
    if owner in (WandbLogger, wandb.sdk.wandb_run.Run):
        logger = WandbLogger(save_dir=tmp_path, offline=True)
    else:
        logger = mlflow_logger(tmp_path / "store")
    before = set_strict(False)
    try:
        trainer = fit([logger, CSVLogger(tmp_path)], 2)
    finally:
        set_strict(before)
    assert trainer.global_step == 6
    said = [str(each.message) for each in recwarn if "no connection" in str(each.message)]
    assert said == [f"{type(logger).__name__}: something is not logged: no connection, attempt 17"]
    assert (Path(trainer.loggers[1].log_dir) / "convergence.html").is_file()


def test_wandb_that_is_switched_off_is_no_error(fit, tmp_path):
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    assert fit(logger, 1).global_step == 3


def test_a_logger_of_ones_own_gets_scalars_alone(fit, recorder, tmp_path):
    fit(recorder, 1)
    assert "kernel/lambda_min" in recorder.scalars
    assert sorted(path.name for path in (tmp_path / "recorder" / "version_0").iterdir()) == FILES[:3]


@pytest.fixture
def stored(tmp_path, make_trainer):
    """A trainer whose logger is MLflow's, and what it has stored of each name."""
    logger = mlflow_logger(tmp_path / "store")
    trainer = make_trainer(logger=logger)

    def values():
        names = logger.experiment.get_run(logger.run_id).data.metrics
        history = logger.experiment.get_metric_history
        return {name: [(each.step, each.value) for each in history(logger.run_id, name)] for name in names}

    return trainer, values


def test_mlflow_has_all_finite_values_under_names_that_it_accepts(stored):
    trainer, values = stored
    odd = {"kernel/nets[0]/x": 1.0, "kernel/nets(0)/x": 2.0, "a//b": 3.0, "../c": 4.0, "/d": 5.0, "e/": 6.0, "m" * 400: 7.0}
    none = {"kernel/nan": float("nan"), "kernel/inf": float("inf"), "kernel/less": float("-inf")}
    log_metrics(trainer, odd | none | {"kernel/lambda_min": 8.0}, 5)
    log_metrics(trainer, none, 6)
    found = values()
    assert sorted(found.values()) == [[(5, float(value))] for value in range(1, 9)]
    assert found["kernel/lambda_min"] == [(5, 8.0)]
    assert {name.rpartition("_")[0] for name in found} >= {"kernel/nets_0_/x", "c", "d"}
    assert {"kernel/nan", "kernel/inf"} <= trainer.callback_metrics.keys()


def test_figures_and_texts_of_any_name_stay_in_their_folder(tmp_path, make_trainer):
    logger = CSVLogger(tmp_path / "inside", name="", version="")
    trainer = make_trainer(logger=logger)
    for tag in ("../../outside", "/absolute", "layer:<0>/..", ".."):
        log_figure(trainer, tag, Figure, 3)
        log_text(trainer, tag, tag, 3)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in written if path.suffix == ".md"]) == 4
    assert len([path for path in written if path.suffix == ".png"]) == 4
    assert all(path.is_relative_to(tmp_path / "inside") for path in written)


def test_a_figure_is_drawn_once_for_all_loggers_and_for_none_not_at_all(tmp_path, make_trainer, recorder):
    drawn = []

    def draw():
        drawn.append(1)
        return Figure()

    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b"), TensorBoardLogger(tmp_path)]
    log_figure(make_trainer(logger=loggers), "kernel/spectrum", draw, 3)
    assert drawn == [1]
    log_figure(make_trainer(logger=recorder), "kernel/spectrum", draw, 3)
    assert drawn == [1]


def test_a_figure_that_cannot_be_drawn_is_said(tmp_path, make_trainer, lenient):
    def draw():
        raise RuntimeError("no ink")

    with pytest.warns(UserWarning, match="kernel/spectrum: the figure is not drawn at step 3: no ink"):
        log_figure(make_trainer(logger=CSVLogger(tmp_path)), "kernel/spectrum", draw, 3)
