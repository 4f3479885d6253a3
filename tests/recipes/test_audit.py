"""`lightning-conv audit` writes the table, the rows and the pictures, for a network as it is or from a checkpoint."""

from __future__ import annotations

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv import label_audit
from lightning_conv.recipes import DigitsDataModule, WideFC
from lightning_conv.recipes.cli import main

NETWORK = ["--model.hidden", "[16]", "--model.width", "24"]


def rows_of(folder):
    with (folder / "labels.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_files_hold_the_audit_of_the_training_samples(tmp_path, capsys):
    assert main(["audit", "--config", "wide_fc", *NETWORK, "--samples", "80", "--out", str(tmp_path)]) == 0
    printed, rows = capsys.readouterr().out, rows_of(tmp_path)
    assert len(rows) == 80
    data = DigitsDataModule()
    data.setup()
    images, labels = data.splits.train.tensors
    numbers = [int(row["training_set"]) for row in sorted(rows, key=lambda row: int(row["sample"]))]
    assert [int(labels[int(row["training_set"])]) for row in rows] == [int(row["given"]) for row in rows]
    margins = [float(row["margin"]) for row in rows]
    assert margins == sorted(margins)
    # The same network by hand: the seed of the configuration is 0.
    pl.seed_everything(0, verbose=False)
    module = WideFC(hidden=[16], width=24, in_features=64, num_classes=10)
    module.configure_model()
    by_hand = label_audit(module.net, images[numbers], labels[numbers])
    assert [int(row["sample"]) for row in rows] == by_hand.order.tolist()
    assert margins == pytest.approx(by_hand.margins[by_hand.order].tolist(), abs=1e-5)
    page = (tmp_path / "labels.md").read_text()
    assert by_hand.table(numbers=numbers).splitlines()[2][:30] in page
    assert page.count("\n| ") == 21
    assert "![The most suspicious samples](labels.png)" in page
    assert (tmp_path / "labels.png").stat().st_size > 1000
    assert "80 training samples, weights as initialised" in printed
    assert printed.rstrip().endswith(
        f"written: {', '.join(str(tmp_path / f'labels.{end}') for end in ('md', 'csv', 'png'))}"
    )


def test_a_checkpoint_gives_the_weights(tmp_path, quiet_trainer):
    data = DigitsDataModule()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="trained")
    trainer = quiet_trainer(max_epochs=1, callbacks=[saved], enable_checkpointing=True)
    module = WideFC(hidden=[16], width=24, guard=False, diagnostics=False)
    trainer.fit(module, datamodule=data)
    words = ["audit", "--config", "wide_fc", *NETWORK, "--samples", "60"]
    assert main([*words, "--checkpoint", str(tmp_path / "trained.ckpt"), "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    rows = rows_of(tmp_path / "a")
    images, labels = data.splits.train.tensors
    numbers = [int(row["training_set"]) for row in sorted(rows, key=lambda row: int(row["sample"]))]
    by_hand = label_audit(module.net, images[numbers], labels[numbers])
    assert [float(row["margin"]) for row in rows] == pytest.approx(by_hand.margins[by_hand.order].tolist(), abs=1e-5)
    assert rows != rows_of(tmp_path / "b")
    assert "trained.ckpt" in (tmp_path / "a" / "labels.md").read_text()


class Regression(pl.LightningModule):
    def __init__(self, fails: bool = False):
        super().__init__()
        self.net, self.fails = nn.Linear(4, 1), fails

    def training_step(self, batch, _):
        if self.fails:
            raise RuntimeError("the step is broken")
        return ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(40, 4)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=10)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--config: audit needs a configuration"),
        (["--config", "wide_fc", "--samples", "5"], "targets: 5 samples; need at least 10"),
        (["--config", "wide_fc", "--samples", "1"], "size=1"),
        (["--config", "wide_fc", "--checkpoint", "gone.ckpt"], "--checkpoint: there is no file"),
        (["--config", "wide_fc", "--checkpoint", __file__], "is no Lightning checkpoint"),
        (["--config", "nobody"], "neither a packaged configuration nor a file"),
        (["--config", "wide_fc", "--sample", "3"], "--sample"),
    ],
)
def test_mistakes_get_one_message(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["audit", *words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("lightning-conv: error: ") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("fails", "says"), [("false", "of a regression have no classes"), ("true", "the step is broken")]
)
def test_a_module_without_labels_and_a_broken_step_get_one_message(fails, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import lightning.pytorch as pl, torch\nfrom torch import nn\nfrom torch.utils.data import DataLoader, TensorDataset\n\n\n"
        + "".join(__import__("inspect").getsource(each) + "\n\n" for each in (Regression, Numbers))
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        f"model:\n  class_path: mine.Regression\n  init_args:\n    fails: {fails}\ndata:\n  class_path: mine.Numbers\n"
    )
    assert main(["audit", "--config", "mine.yaml"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("lightning-conv: error: ") == 1


def test_weights_of_another_network_are_refused(tmp_path, capsys):
    torch.save({"state_dict": {"net.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    words = ["audit", "--config", "wide_fc", "--checkpoint", str(tmp_path / "other.ckpt"), "--out", str(tmp_path)]
    assert main(words) == 2
    assert "are not those of WideFC with these settings" in capsys.readouterr().err


def test_text_has_no_pictures(tmp_path):
    words = ["audit", "--config", "wide_fc", "--data", "TextDataModule", "--data.n_train", "60", *NETWORK]
    assert main([*words, "--samples", "40", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "labels.png").exists()
    assert len(rows_of(tmp_path)) == 40
    assert "labels.png" not in (tmp_path / "labels.md").read_text()
