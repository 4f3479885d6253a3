"""What people's loggers have of a run, read back with the readers of their own packages, without a network."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import time
import zipfile
from pathlib import Path

import mlflow
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from wandb.proto.wandb_internal_pb2 import Record

from lightning_conv.callbacks import ConvergenceReport, LambdaMin
from lightning_conv.callbacks.run.guarded import set_strict
from lightning_conv.callbacks.run.logging import log_figure, log_metrics, log_text
from lightning_conv.callbacks.run.run_log import RunLog
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
        "COMET_AUTO_LOG_ENV_DETAILS": "false",
        "COMET_AUTO_LOG_ENV_HOST": "false",
        "COMET_AUTO_LOG_ENV_NETWORK": "false",
        "COMET_ERROR_TRACKING_ENABLE": "false",
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
def fit(make_trainer, make_regression):
    """Train a small network, three steps an epoch, and return the trainer with its report."""

    def run(logger, epochs=2, ckpt_path=None):
        torch.manual_seed(0)
        inputs = torch.randn(24, 4)
        data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)
        network = nn.Sequential(nn.Linear(4, 12), nn.Softplus(), nn.Linear(12, 1))
        report = ConvergenceReport()
        callbacks = [LambdaMin(8, every_n_steps=2, per_layer="traces"), report]
        trainer = make_trainer(callbacks, max_epochs=epochs, logger=logger)
        trainer.fit(make_regression(network, 0.01), data, ckpt_path=ckpt_path)
        return trainer, report

    return run


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A data base of MLflow without a run: making the tables takes longer than a test."""
    path = tmp_path_factory.mktemp("mlflow") / "runs.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_logger(tmp_path, empty_store):
    """Make loggers of one store, which is in the test's folder."""

    def make(**options):
        if not (store := tmp_path / "runs.db").exists():
            shutil.copy(empty_store, store)
        folder = f"{tmp_path}/artifacts"
        return MLFlowLogger("digits", tracking_uri=f"sqlite:///{store}", artifact_location=folder, **options)

    return make


def wandb_records(folder):
    """Every record of the offline runs below a folder, in order; their writer may still be at work when a run has finished."""
    latest = time.monotonic() + 60
    while True:
        runs = [records_of(path.read_bytes()) for path in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb"))]
        if all(any(each.HasField("exit") for each in run) for run in runs):
            return [each for run in runs for each in run]
        assert time.monotonic() < latest
        time.sleep(0.05)


def records_of(content):
    """The records in a file of W&B.

    The package has no reader of its own: its files are logs of LevelDB behind seven bytes, of blocks of 32 kB, in which a record is cut
    into pieces with a checksum, a length and a kind before each.
    """
    found, at, record = [], 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # what is left of a block is too short for a piece
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if at + 7 + length > len(content):
            break  # it is being written
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(record))
            record = b""
    return found


def wandb_history(folder):
    """The rows of the history, each a dict by key; of an image or a table there is a dict."""
    for record in wandb_records(folder):
        if record.HasField("history"):
            row = {}
            for item in record.history.item:
                key, *rest = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[key] = row.get(key, {}) | {"/".join(rest): value} if rest else value
            yield row


def one(paths):
    (found,) = paths
    return found


def is_picture(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and min(picture.size) > 100 and picture.convert("L").getextrema()[0] < 200


def test_wandb_has_scalars_figures_texts_and_the_page_of_its_run(fit, tmp_path, capfd):
    logger = WandbLogger(project="digits", save_dir=tmp_path, offline=True)
    trainer, report = fit(logger)
    wandb.finish()
    folder = tmp_path / "digits" / logger.version
    assert report.folder_of(trainer) == folder
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
    texts = [row["kernel/layers"] for row in rows if "kernel/layers" in row]
    table = json.loads((files / texts[-1]["path"]).read_text())
    assert table["columns"] == ["step", "text"]
    assert "network.0" in table["data"][0][1]
    page = one(row["convergence/page"] for row in rows if "convergence/page" in row)
    assert (files / page["path"]).read_text("utf-8") == (folder / "convergence.html").read_text("utf-8")
    said = capfd.readouterr()
    # Lightning passes ``anonymous``; a step that goes backwards would be said here.
    warnings = [line for line in (said.err + said.out).splitlines() if "wandb: WARNING" in line]
    assert all("anonymous" in line for line in warnings), warnings


def test_mlflow_has_scalars_figures_texts_and_the_page_of_its_run(fit, tmp_path, mlflow_logger):
    logger = mlflow_logger()
    trainer, _ = fit(logger)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs.db")
    run = one(client.search_runs([logger.experiment_id]))
    assert run.info.status == "FINISHED"
    values = client.get_metric_history(run.info.run_id, "kernel/lambda_min")
    assert [each.step for each in values] == [0, 2, 4, 6]
    assert values[-1].value == pytest.approx(float(trainer.callback_metrics["kernel/lambda_min"]), rel=1e-6)
    kept = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, dst_path=str(tmp_path / "down"), tracking_uri=f"sqlite:///{tmp_path}/runs.db"
    )
    ours = Path(kept) / "convergence"
    folder = tmp_path / str(logger.experiment_id) / run.info.run_id
    for name in FILES:
        assert (ours / name).read_bytes() == (folder / name).read_bytes()
    assert is_picture(ours / "figures" / "kernel" / "spectrum.png")
    assert is_picture(ours / "convergence.png")
    assert (ours / "texts" / "kernel" / "layers.md").read_text("utf-8").startswith("*Step ")


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
        assert {"kernel/lambda_min", "kernel/trace"} <= scalars
        uploads = [each["additional_params"] for each in sent if "additional_params" in each]
        names = {each.get("fileName") for each in uploads}
        assert {f"convergence/{name}" for name in [*FILES, "texts/kernel/layers.md"]} <= names
        assert {"kernel/spectrum", "kernel/per_layer"} <= {each.get("figName") for each in uploads}


def test_csv_has_pictures_and_texts_beside_its_table(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="digits")
    fit(logger)
    folder = Path(logger.log_dir)
    assert {*FILES, "metrics.csv"} <= {path.name for path in folder.iterdir()}
    assert is_picture(folder / "convergence.png")
    assert is_picture(folder / "figures" / "kernel" / "spectrum.png")
    text = (folder / "texts" / "kernel" / "layers.md").read_text("utf-8")
    assert text.startswith("*Step ")
    assert "network.0" in text


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_two_runs_of_a_project_keep_their_reports(fit, tmp_path, kind, mlflow_logger):
    folders, pages = [], []
    for epochs in (1, 2):
        if kind == "wandb":
            logger = WandbLogger(project="digits", save_dir=tmp_path, offline=True)
        else:
            logger = mlflow_logger()
        trainer, report = fit(logger, epochs)
        wandb.finish()
        folders.append(report.folder_of(trainer))
        pages.append((folders[-1] / "convergence.html").read_bytes())
    assert folders[0] != folders[1]
    assert [(folder / "convergence.html").read_bytes() for folder in folders] == pages
    ends = [json.loads((each / "convergence.json").read_text())["facts"]["optimizer steps"] for each in folders]
    assert ends == [3, 6]


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_resumed_run_goes_on_in_its_folder_with_its_charts(fit, tmp_path, kind, mlflow_logger):
    def logger(known=None):
        if kind == "wandb":
            return WandbLogger(project="digits", save_dir=tmp_path, offline=True, id=known)
        return mlflow_logger(run_id=known)

    first = logger()
    trainer, _ = fit(first, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    known = first.version
    wandb.finish()
    again = logger(known)
    trainer, report = fit(again, 2, ckpt_path=tmp_path / "last.ckpt")
    assert again.version == known
    wandb.finish()
    stored = json.loads((report.folder_of(trainer) / "convergence.json").read_text())
    assert stored["series"]["kernel/lambda_min"]["steps"] == [0, 2, 3, 4, 6]
    assert len([*(tmp_path / report.folder_of(trainer).relative_to(tmp_path).parts[0]).rglob("convergence.json")]) == 1


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_the_page_is_made_again_where_only_this_logger_was_used(fit, tmp_path, kind, mlflow_logger):
    logger = WandbLogger(save_dir=tmp_path, offline=True) if kind == "wandb" else mlflow_logger()
    trainer, report = fit(logger)
    folder = report.folder_of(trainer)
    before = (folder / "convergence.html").read_text("utf-8")
    (folder / "convergence.html").unlink()
    assert main(["report", str(folder)]) == 0
    after = (folder / "convergence.html").read_text("utf-8")
    charts = [page.partition('id="data-charts">')[2].partition("</script>")[0] for page in (before, after)]
    assert charts[0] == charts[1]
    assert "lambda_min" in charts[0]


def test_three_loggers_at_once_have_the_same_run(fit, tmp_path, mlflow_logger):
    board, rows = TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="rows")
    store, panels = mlflow_logger(), WandbLogger(save_dir=tmp_path, offline=True)
    trainer, report = fit([store, panels, rows, board])
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
def test_a_logger_that_raises_is_said_once_and_the_run_goes_on(
    fit, tmp_path, monkeypatch, recwarn, owner, method, mlflow_logger
):
    original, attempts = getattr(owner, method), []

    def fails(self, *args, **kwargs):
        if method == "log_metrics" and not any("/" in name for name in args[0]):
            return original(self, *args, **kwargs)  # Lightning's own call, which it does not guard
        attempts.append(1)
        raise RuntimeError(f"no connection, attempt {len(attempts)}")

    monkeypatch.setattr(owner, method, fails)
    if owner in (WandbLogger, wandb.sdk.wandb_run.Run):
        logger = WandbLogger(save_dir=tmp_path, offline=True)
    else:
        logger = mlflow_logger()
    before = set_strict(False)
    try:
        trainer, _ = fit([logger, CSVLogger(tmp_path)])
    finally:
        set_strict(before)
    assert trainer.global_step == 6
    said = [str(each.message) for each in recwarn if "no connection" in str(each.message)]
    assert said == [f"{type(logger).__name__}: something is not logged: no connection, attempt 1"]
    assert attempts
    assert (Path(trainer.loggers[1].log_dir) / "convergence.html").is_file()


def test_wandb_that_is_switched_off_is_no_error(fit, tmp_path):
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    assert fit(logger, 1)[0].global_step == 3


def test_a_logger_of_ones_own_gets_scalars_alone(fit, recorder, tmp_path):
    fit(recorder, 1)
    assert "kernel/lambda_min" in recorder.scalars
    assert sorted(path.name for path in (tmp_path / "recorder" / "version_0").iterdir()) == FILES[:3]


@pytest.fixture
def stored(tmp_path, make_trainer, mlflow_logger):
    """A trainer whose logger is MLflow's, and what it has stored of each name."""
    logger = mlflow_logger()
    trainer = make_trainer(logger=logger)

    def values():
        names = logger.experiment.get_run(logger.run_id).data.metrics
        history = logger.experiment.get_metric_history
        return {name: [(each.step, each.value) for each in history(logger.run_id, name)] for name in names}

    return trainer, values


def test_mlflow_has_all_finite_values_under_names_that_it_accepts(stored):
    trainer, values = stored
    odd = {
        "kernel/nets[0]/x": 1.0,
        "kernel/nets(0)/x": 2.0,
        "a//b": 3.0,
        "../c": 4.0,
        "/d": 5.0,
        "e/": 6.0,
        "m" * 400: 7.0,
    }
    none = {"kernel/nan": float("nan"), "kernel/inf": float("inf"), "kernel/less": float("-inf")}
    log = RunLog()
    log.log(trainer, odd | {"kernel/lambda_min": 8.0}, 5)
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
