"""`lightning-conv check`: exit codes, text, JSON, and no file."""

import json
import re

import pytest

from lightning_conv.recipes.cli import main

MODULE = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, count: int = 12):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(self.count, 6).cumsum(0), torch.ones(self.count, 2)), batch_size=4)
"""

CPU = ("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_epochs", "2")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Options of a module and data of a user, who is in an empty folder."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "of_a_user.py").write_text(MODULE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield ["check", "--module", "of_a_user.Net", "--data", "of_a_user.Data", *CPU]
    assert list((tmp_path / "here").iterdir()) == []


def test_a_module_of_the_users_own_is_checked(own, capsys):
    assert main([*own, "--module.width", "11"]) == 0
    out, err = capsys.readouterr()
    assert "Net: everything can be measured" in out
    assert "MSELoss (observed)" in out
    assert "net.2" in out
    assert "11: [h, 1] of 12 rows can have full rank" in out
    assert "\x1b" not in out
    assert err == ""


def test_what_is_refused_is_exit_code_1(own, capsys):
    assert main([*own, "--data.count", "1"]) == 1
    assert "refused:" in capsys.readouterr().out


def test_json_is_all_of_it(own, capsys):
    assert main([*own, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["ok"]
    assert read["networks"][0]["samples"] == 12
    assert read["networks"][0]["cost"]["epochs"] == 2


def test_usage_errors_are_exit_code_2(own, capsys):
    assert main(["check"]) == 2
    assert main([*own, "--trainer.max_epoch", "3"]) == 2
    assert main(["check", "--config", "no_such_recipe"]) == 2
    err = capsys.readouterr().err
    assert "check: name a run" in err
    assert "max_epoch" in err
    assert "no_such_recipe" in err


def test_a_mistake_is_said_of_the_option_that_was_written(own, capsys):
    assert main(["check", "--module", "of_a_user.Nett", *own[3:]]) == 2
    err = capsys.readouterr().err
    assert "check: --module: there is no 'Nett' in of_a_user" in err
    assert "--model" not in err


def test_without_data_it_is_said_whose_samples_are_looked_at(own, capsys):
    note = "no --data was given, so the samples are those of DigitsDataModule"
    assert main(["check", "--module", "of_a_user.Net", *CPU]) == 1
    assert note in " ".join(capsys.readouterr().out.split())
    assert main(own) == 0
    assert note not in " ".join(capsys.readouterr().out.split())


def test_a_measurement_is_predicted_for_ranks_of_a_device(own, capsys):
    assert main([*own, "--ranks", "4", "--device=H100"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Predicted for 4 ranks" in out
    assert "NVIDIA H100 SXM 80 GB: 4 ranks on 1 node" in out
    assert "whatever N" in out
    assert re.search(r"\| messages \| [\d.]+ m?s \| 0 s \|", out)
    assert main([*own, "--ranks", "4", "--device", "h100", "--json"]) == 0
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    scale = network["scale"]
    assert (scale["ranks"], scale["nodes"], network["scale_missing"]) == (4, 1, "")
    assert scale["seconds"] == pytest.approx(sum(scale["parts"].values()))
    assert scale["messages"] > 0


def test_without_ranks_nothing_is_predicted(own, capsys):
    assert main([*own, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["networks"][0]["scale"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "check: --ranks: '0'; need a whole number of at least 1, such as 8"),
        (["--ranks", "two"], "check: --ranks: 'two'; need a whole number of at least 1, such as 8"),
        (["--ranks"], "check: --ranks needs a value"),
        (
            ["--device", "h10"],
            "check: --device: 'h10' is not known; did you mean h100? known are cpu, a100, h100, h200",
        ),
    ],
)
def test_a_mistake_in_ranks_or_device_says_what_to_write(own, capsys, words, message):
    assert main([*own, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_names_the_options(capsys):
    assert main(["check", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.slow
def test_a_check_of_adapters_pre_trains_nothing_and_names_what_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--model.width",
        "8",
        "--model.depth",
        "1",
        "--model.heads",
        "2",
        "--model.rank",
        "2",
        "--data.length",
        "16",
    ]
    assert main(["check", "--config", "lora", "--json", *CPU, *words, "--data.n_train", "64"]) == 0
    json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["wide_fc", "bn_resnet"])
def test_the_recipes_can_be_checked(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--config", recipe, "--json", *CPU]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["head"]["asked"]
    assert read["head"]["name"]
    assert list(tmp_path.iterdir()) == []
