"""`lightning-conv report` makes the page from what a logger has written, and says what it cannot find and where to look."""

import json
import re
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_conv.callbacks import ConvergenceDiagnostics
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.read_run import read_run, read_series


class Net(pl.LightningModule):
    def __init__(self, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.loss_fn = nn.MSELoss()

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        loss = self.loss_fn(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def train(logger, lr=0.05):
    torch.manual_seed(0)
    inputs = torch.randn(16, 4)
    trainer = pl.Trainer(
        max_epochs=6,
        logger=logger,
        callbacks=[ConvergenceDiagnostics(16, every_n_steps=2)],
        accelerator="cpu",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Net(lr), DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=16))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one run with TensorBoard and of two with CSV files, without their pages."""
    root = tmp_path_factory.mktemp("runs")
    train(TensorBoardLogger(root, name="board"))
    train(CSVLogger(root, name="csv"))
    train(CSVLogger(root, name="csv"), lr=0.1)
    found = {
        "board": root / "board" / "version_0",
        "csv": root / "csv" / "version_0",
        "faster": root / "csv" / "version_1",
    }
    for folder in found.values():
        (folder / "convergence.html").unlink()
    return found


def charts(path):
    return {
        each["title"]: each
        for each in json.loads(re.search(r'id="data-charts">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)[1])
    }


@pytest.mark.parametrize("kind", ["board", "csv"])
def test_the_page_of_a_run_has_what_its_logger_has(runs, kind, capsys):
    assert main(["report", str(runs[kind])]) == 0
    page = runs[kind] / "convergence.html"
    assert capsys.readouterr().out == f"page: {page}\n"
    line = charts(page)["lambda_min"]["lines"][0]
    assert line["x"] == [0, 2, 4, 6]
    stored = json.loads((runs[kind] / "convergence.json").read_text())
    assert line["y"][-1] == pytest.approx(stored["metrics"]["kernel/lambda_min"], rel=1e-4)
    assert "train_loss" in [each["label"] for each in charts(page)["Loss"]["lines"]]
    text = page.read_text("utf-8")
    assert all(each["sentence"].split()[0] in text for each in stored["health"])
    assert "Layers: share of the trace" in text


def test_both_loggers_tell_the_same(runs):
    board, rows = (read_series(runs[kind]) for kind in ("board", "csv"))
    common = board.keys() & rows.keys()
    assert {"kernel/lambda_min", "theory/loss", "train_loss"} <= common
    for tag in common - {"epoch"}:
        # TensorBoard gets what changes, in numbers of four bytes.
        known = dict(zip(rows[tag].steps, rows[tag].values, strict=True))
        assert board[tag].values == pytest.approx([known[at] for at in board[tag].steps], rel=1e-5, abs=1e-30), tag


def test_runs_side_by_side_are_one_page_with_short_names(runs, tmp_path, capsys):
    out = tmp_path / "new" / "compared.html"
    assert main(["report", *map(str, runs.values()), str(runs["csv"]), "--compare", "--out", str(out)]) == 0
    assert [each["label"] for each in charts(out)["lambda_min"]["lines"]] == [
        "board/version_0",
        "csv/version_0",
        "csv/version_1",
    ]
    assert "Settings that differ" in out.read_text("utf-8")


def test_a_run_without_our_file_is_drawn_and_said_not_to_be_judged(tmp_path):
    writer = SummaryWriter(tmp_path)
    for step in range(5):
        writer.add_scalar("my/loss", 1.0 / (1 + step), step)
    writer.add_scalar("my/loss", float("nan"), 5)
    writer.close()
    (tmp_path / "hparams.yaml").write_text("lr: 0.1\n")
    assert main(["report", str(tmp_path)]) == 0
    page = tmp_path / "convergence.html"
    assert charts(page)["Loss"]["lines"][0]["y"] == [*(pytest.approx(1 / k, rel=1e-5) for k in range(1, 6)), None]
    assert "so nothing is judged" in page.read_text("utf-8")
    assert "lr" in page.read_text("utf-8")


def test_a_resumed_run_continues_in_its_second_file(tmp_path):
    for name, steps, value in (("a", range(6), 1.0), ("b", range(3, 8), 2.0)):
        writer = SummaryWriter(tmp_path)
        for step in steps:
            writer.add_scalar("my/loss", value, step)
        writer.close()
        (written,) = [path for path in tmp_path.iterdir() if path.name.startswith("events")]
        written.rename(tmp_path / f"{name}.kept")
    (tmp_path / "a.kept").rename(tmp_path / "events.out.tfevents.1.x")
    (tmp_path / "b.kept").rename(tmp_path / "events.out.tfevents.2.x")
    found = read_series(tmp_path)["my/loss"]
    assert (found.steps, found.values) == (list(range(8)), [1.0] * 3 + [2.0] * 5)


def test_mistakes_name_the_cure(runs, tmp_path, capsys):
    def refused(*words):
        assert main(["report", *map(str, words)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("lightning-conv: error: report: ")
        assert message.count("\n") == 1
        return message

    assert "there is no such folder; pass the folder" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "it is a file; pass the folder" in refused(tmp_path / "file")
    assert "ConvergenceDiagnostics()" in refused(tmp_path)
    root = runs["csv"].parents[1]
    assert f"runs below it: {runs['board']}, {runs['csv']}, {runs['faster']}" in refused(root)
    assert "add --compare" in refused(runs["csv"], runs["faster"], "--out", tmp_path / "x.html")
    assert "required: RUN" in refused()
    assert "--compared" in refused(runs["csv"], "--compared")
    assert "cannot be written" in refused(runs["csv"], "--out", tmp_path / "file" / "x.html")
    for name, text, what in (
        ("convergence.json", "{", "remove it"),
        ("convergence.json", '{"facts": {}}', "not one that ConvergenceReport wrote"),
        ("metrics.csv", "a,b\n1,2\n", "line 2 cannot be read"),
        ("metrics.csv", "step,b\n1,x\n", "line 2 cannot be read"),
        ("metrics.csv", "step,kernel/lambda_m", "have no values yet, or break off before the first"),
        ("events.out.tfevents.1.x", "no event file", ""),
    ):
        folder = tmp_path / f"broken_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_text(text)
        assert what in refused(folder), name


def test_what_breaks_off_is_read_up_to_there(runs, tmp_path):
    (events,) = runs["board"].glob("events*")
    whole = read_series(runs["board"])["theory/loss"]
    (tmp_path / events.name).write_bytes(events.read_bytes()[:-200])
    part = read_run(tmp_path).series["theory/loss"]
    assert 0 < len(part) <= len(whole)
    assert part.values == whole.values[: len(part)]


def test_help_needs_nothing_of_the_run():
    code = "import sys; from lightning_conv.recipes.cli import main; main(['report', '--help']); print('lightning' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--compare" in said
    assert said.endswith("False\n")
