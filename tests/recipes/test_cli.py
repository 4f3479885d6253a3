"""What the command promises: recipes by name, closing tables, and one clear message for an error of the user."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_conv
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.named_configs import recipe_names, resolve_configs

# 179 training samples: two epochs take a second.
QUICK = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--data.test_fraction", "0.9"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "1"),
]


SMALL = {
    "wide_fc": [],
    "bn_resnet": ["--model.arch", "resnet8", "--model.channels", "4", "--model.probe_size", "8"],
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_help_and_version_import_neither_torch_nor_lightning_by_themselves():
    code = (
        "import sys, lightning_conv\n"
        "before = set(sys.modules)\n"
        "from lightning_conv.recipes.cli import main\n"
        "assert main(['--help']) == main(['version']) == main(['tables', '--help']) == 0\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not added & {'torch', 'torchvision', 'lightning', 'jsonargparse', 'rich'}, added\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("fit", "validate", "test", "compare", "tables", "version", "wide_fc", "bn_resnet", "--seeds"):
        assert word in done.stdout
    assert f"lightning-conv {lightning_conv.__version__}" in done.stdout


def test_a_recipe_is_found_by_name_and_a_file_by_path(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("seed_everything: 1\n")
    separate, joined, short = (
        resolve_configs(words) for words in (["--config", "wide_fc"], ["--config=wide_fc"], ["-c", str(own)])
    )
    assert separate[0] == "--config"
    assert joined == [f"--config={separate[1]}"]
    assert yaml.safe_load(Path(separate[1]).read_text())["model"]["class_path"] == "lightning_conv.recipes.WideFC"
    assert short == ["-c", str(own)]


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_an_unknown_recipe_is_one_message_with_the_known_names(command, capsys):
    assert main([command, "--config", "wide_cf"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "'wide_cf'" in message
    assert all(name in message for name in recipe_names())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train"], ["'train'", "fit"]),
        (["compare"], ["--config"]),
        (["fit", "--config", "wide_fc", "--model.widht", "3"], ["widht"]),
        (["fit", "--config", "wide_fc", "--model.lr", "fast"], ["lr", "fast"]),
        (["fit", "--config", "bn_resnet", "--model.arch", "resnet15"], ["arch", "resnet15", "resnet14"]),
        (["fit", "--config", "bn_resnet", "--data.batch_size", "1436"], ["batch_size", "1436"]),
        (["fit", "--config", "wide_fc", "--trainer.max_epoch", "3"], ["max_epoch"]),
        (["fit", "--config", "wide_fc", "--data", "TorchvisionDataModule", "--data.dataset", "MNST"], ["MNIST"]),
        (["fit", "--config", "wide_fc", "--data", "TorchvisionDataModule", "--data.root", "gone"], ["gone", "MNIST"]),
        (["test", "--config", "wide_fc", "--ckpt_path", "lost.ckpt"], ["lost.ckpt"]),
    ],
)
def test_an_error_of_the_user_is_one_message_without_a_traceback(args, words, capsys):
    assert main(args) == 2
    err = capsys.readouterr().err
    (message,) = lines_with(err, "lightning-conv: error:")
    assert all(word in message for word in words)
    assert "Traceback" not in err


def test_every_packaged_recipe_is_tested_here():
    assert recipe_names() == sorted(SMALL)


@pytest.mark.parametrize("recipe", SMALL)
def test_a_printed_configuration_names_every_setting_of_the_model_and_repeats_itself(recipe, tmp_path, capsys):
    assert main(["fit", "--config", recipe, "--print_config"]) == 0
    printed = capsys.readouterr().out
    model = yaml.safe_load(printed)["model"]
    packaged = yaml.safe_load(Path(resolve_configs(["--config", recipe])[1]).read_text())["model"]
    assert model == packaged
    Path("own.yaml").write_text(printed)
    assert main(["fit", "--config", "own.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("recipe", SMALL)
def test_fit_closes_with_a_table_and_the_way_to_the_logs(recipe, capsys):
    assert main(["fit", "--config", recipe, *QUICK, *SMALL[recipe]]) == 0
    out = capsys.readouterr().out
    assert lines_with(out, "optimizer steps", "2 / 6")
    assert lines_with(out, "phase reached", "2 of 2")
    assert lines_with(out, "rank of [h, 1]", "179 / 179")
    assert lines_with(out, "fell in every phase-2 epoch", "yes, in all 1")
    assert lines_with(out, "lambda_min")
    folder = Path("runs", recipe, "version_0")
    assert lines_with(out, "logs: ", str(folder))
    assert lines_with(out, "tensorboard --logdir runs")
    assert (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_a_saved_configuration_repeats_the_run_and_its_checkpoint_is_tested(capsys):
    assert main(["fit", "--config", "wide_fc", *QUICK, "--model.guard", "false", "--model.diagnostics", "false"]) == 0
    folder = Path("runs", "wide_fc", "version_0")
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    first, second = lines_with(capsys.readouterr().out, "training loss")
    assert first == second
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    assert main(["test", "--config", str(folder / "config.yaml"), "--ckpt_path", checkpoint]) == 0
    assert "test_acc" in capsys.readouterr().out


def test_a_run_without_a_logger_writes_no_configuration(tmp_path, capsys):
    assert (
        main(["fit", "--config", "wide_fc", *QUICK, "--model.diagnostics", "false", "--trainer.logger", "false"]) == 0
    )
    assert not (tmp_path / "config.yaml").exists()
    assert "logs:" not in capsys.readouterr().out


def test_a_torchvision_set_is_chosen_by_its_short_name(mnist_root, capsys):
    quick = [
        word for pair in zip(QUICK[::2], QUICK[1::2], strict=True) if "test_fraction" not in pair[0] for word in pair
    ]
    words = ["--data", "TorchvisionDataModule", "--data.dataset", "MNIST", "--data.root", str(mnist_root)]
    assert main(["fit", "--config", "wide_fc", *words, *quick]) == 0
    assert lines_with(capsys.readouterr().out, "optimizer steps", "2 / 2")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL)
def test_compare_prints_both_accuracies_and_their_difference_in_points(recipe, capsys):
    assert main(["compare", "--config", recipe, *QUICK, *SMALL[recipe], "--model.diagnostics", "false"]) == 0
    out = capsys.readouterr().out
    (row,) = lines_with(out, "test accuracy", "%")
    guarded, plain = (float(cell.strip().removesuffix("%")) for cell in row.split("│")[2:4])
    (difference,) = lines_with(out, "points")
    assert float(difference.split()[-2]) == pytest.approx(guarded - plain, abs=0.011)
    (steps,) = lines_with(out, "optimizer steps")
    assert steps.split("│")[2].strip() == steps.split("│")[3].strip()


def test_compare_refuses_a_guard_that_both_runs_would_keep(capsys):
    words = ["--trainer.callbacks+=lightning_conv.callbacks.ExpressivityGuard"]
    assert main(["compare", "--config", "wide_fc", *QUICK, *words]) == 2
    assert "trainer.callbacks: contains an ExpressivityGuard" in capsys.readouterr().err


def test_the_switch_is_a_share_or_a_step(capsys):
    assert main(["fit", "--config", "wide_fc", *QUICK, "--model.switch_at", "4", "--model.diagnostics", "false"]) == 0
    assert lines_with(capsys.readouterr().out, "phase reached", "2 of 2")


def test_the_last_layer_is_solved_on_request(capsys):
    words = ["--model.switch_at", "4", "--model.step_rule", "solve", "--model.diagnostics", "false"]
    assert main(["fit", "--config", "wide_fc", *QUICK, *words]) == 0
    assert lines_with(capsys.readouterr().out, "optimizer steps", "2 / 4 ")


def test_the_switch_may_be_automatic(capsys):
    words = ["--model.switch_at", "auto", "--model.diagnostics", "false"]
    assert main(["fit", "--config", "wide_fc", *QUICK, *words]) == 0
    assert lines_with(capsys.readouterr().out, "phase reached", "of 2")
