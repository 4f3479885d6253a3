"""What the command promises: recipes by name, closing tables, and one clear message for an error of the user."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

import lightning_conv
from lightning_conv import callbacks
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.commands import COMMANDS, RUNS
from lightning_conv.recipes.named_configs import config_file, overlay_names, recipe_names, resolve_configs
from lightning_conv.recipes.runs import SHORT_NAMES_OF_CALLBACKS, known_classes

# 179 training samples: two epochs take a second.
QUICK = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--data.test_fraction", "0.9"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "1"),
]


FIT = ["fit", "--config", "wide_fc"]
SMALL = {
    "wide_fc": [],
    "bn_resnet": ["--model.arch", "resnet8", "--model.channels", "4", "--model.probe_size", "8"],
    "lora": [
        *(
            "--model.width",
            "8",
            "--model.depth",
            "1",
            "--model.heads",
            "2",
            "--model.rank",
            "2",
            "--model.pretrain_steps",
            "2",
        ),
        *(
            "--model.probe_size",
            "4",
            "--data.length",
            "16",
            "--data.n_train",
            "32",
            "--data.n_test",
            "8",
            "--data.batch_size",
            "8",
        ),
    ],
}
GUARDED = ["wide_fc", "bn_resnet"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


LIGHT = [
    [], ["--help"], ["version"], ["configs"], ["completion", "bash"], ["lab"], ["lab", "--help"],
    *([command, "--help"] for command in (*RUNS, "tables", "report")),
]  # fmt: skip


def loaded_by(*calls: list[str]) -> tuple[set[str], str]:
    """Packages that a fresh process has loaded after these calls, and what they printed; each must end with code 0."""
    code = (
        "import sys\nfrom lightning_conv.recipes.cli import main\n"
        f"for words in {calls!r}: assert main(words) == 0, words\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split()), done.stdout


def test_help_of_every_command_loads_nothing_heavy():
    loaded, said = loaded_by(*LIGHT)
    heavy = {
        "torch",
        "torchvision",
        "lightning",
        "torchmetrics",
        "jsonargparse",
        "rich",
        "numpy",
        "scipy",
        "matplotlib",
    }
    assert not loaded & heavy
    for word in (*COMMANDS, *recipe_names(), *overlay_names(), "--seeds", "--checkpoint", "--help-all", "du_two_layer"):
        assert word in said
    assert f"lightning-conv {lightning_conv.__version__}" in said


@pytest.mark.parametrize(
    "words", [["fit"], ["fit", "--config", "wide_cf"], ["fiit"], ["lab", "du_trian"], ["tables", "--seed", "3"]]
)
def test_a_mistake_that_needs_nothing_heavy_is_said_at_once(words):
    code = (
        "import sys\nfrom lightning_conv.recipes.cli import main\n"
        f"assert main({words!r}) == 2\nassert not {{'torch', 'lightning', 'numpy'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", RUNS)
def test_the_short_help_shows_own_options_first_and_where_the_rest_is(command, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 60
    assert f"usage: lightning-conv {command} --config NAME" in said
    assert "--help-all" in said
    assert "lightning.pytorch" not in said
    if command == "audit":
        assert said.index("--samples") < said.index("--trainer.NAME")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "audit"])
def test_all_options_are_printed_on_request(command, capsys):
    assert main([command, "--help-all"]) == 0
    said = capsys.readouterr().out
    assert "--trainer.accumulate_grad_batches" in said
    assert ("--samples" in said) == (command == "audit")


def test_the_settings_of_a_class_are_printed_on_request(capsys):
    assert main(["fit", "--model.help", "WideFC"]) == 0
    assert "--model.width_factor WIDTH_FACTOR" in capsys.readouterr().out


@pytest.mark.parametrize("command", RUNS)
def test_a_command_without_a_configuration_runs_nothing_and_says_which_there_are(command, capsys):
    assert main([command, "--seed_everything", "3"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    first, *rest = said.err.splitlines()
    assert first.startswith(
        f"lightning-conv: error: --config: {command} needs a configuration, such as: lightning-conv {command} --config"
    )
    assert all(any(line.split()[:1] == [name] for line in rest) for name in (*recipe_names(), *overlay_names()))


def test_a_model_without_a_configuration_needs_an_end(capsys):
    assert main(["fit", "--model", "WideFC"]) == 2
    assert "--trainer.max_epochs" in capsys.readouterr().err
    words = [
        "--model",
        "WideFC",
        "--model.diagnostics=false",
        "--model.guard=false",
        "--trainer.fast_dev_run=true",
        "--trainer.accelerator=cpu",
    ]
    assert main(["fit", *words]) == 0


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


def test_overlays_stand_behind_the_files_that_they_add_to(tmp_path):
    own, recipe, plus = tmp_path / "own.yaml", str(config_file("wide_fc")), str(config_file("+diagnostics"))
    own.write_text("seed_everything: 1\n")
    words = ["--config", "+diagnostics", "--trainer.max_epochs", "3", "--config=wide_fc", "-c", str(own)]
    assert resolve_configs(words) == ["--config", recipe, "--trainer.max_epochs", "3", f"--config={own}", "-c", plus]
    assert resolve_configs(["--config", f"+{own}", "--config", "wide_fc"]) == ["--config", recipe, "--config", str(own)]


@pytest.mark.parametrize("first", ["wide_fc", "+diagnostics"])
def test_overlays_add_to_the_lists_of_a_recipe_in_any_order(first, capsys):
    rest = [name for name in ("wide_fc", "+diagnostics", "+csv", "own.yaml") if name != first]
    Path("own.yaml").write_text(
        "trainer:\n  max_epochs: 7\n  callbacks+:\n  - class_path: EarlyStopping\n    init_args: {monitor: val_loss}\n"
    )
    assert main(["fit", *(word for name in (first, *rest) for word in ("--config", name)), "--print_config"]) == 0
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    kinds = {key: [each["class_path"].rpartition(".")[2] for each in trainer[key]] for key in ("callbacks", "logger")}
    assert kinds["callbacks"] == ["ModelCheckpoint", "EarlyStopping", "ConvergenceDiagnostics"]
    assert kinds["logger"] == ["TensorBoardLogger", "CSVLogger"]
    assert trainer["logger"][0]["init_args"]["name"] == "wide_fc"
    assert trainer["max_epochs"] == 7


@pytest.mark.parametrize("name", overlay_names())
def test_every_overlay_is_accepted_and_says_what_it_is(name, capsys):
    assert main(["fit", "--config", "wide_fc", "--config", name, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] == 40
    assert config_file(name).read_text().startswith("# Adds ")
    assert main(["configs"]) == 0
    assert f"  {name} " in capsys.readouterr().out


def test_a_recipe_with_overlays_runs_with_what_they_add(capsys):
    words = ["--config", "wide_fc", "--config", "+diagnostics", "--config", "+csv", "--config", "+guard"]
    assert main(["fit", *words, *QUICK, "--model.diagnostics", "false"]) == 0
    (metrics,) = Path("runs").rglob("metrics.csv")
    header = metrics.read_text().splitlines()[0]
    assert "kernel/lambda_min" in header
    assert list(Path("runs").rglob("convergence.html"))
    (saved,) = Path("runs", "wide_fc").rglob("config.yaml")
    kinds = [
        each["class_path"].rpartition(".")[2] for each in yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    ]
    assert kinds == ["ModelCheckpoint", "ConvergenceDiagnostics", "ExpressivityGuard"]
    assert lines_with(capsys.readouterr().out, "phase reached", "2 of 2")


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
        (["fi"], ["'fi'", "did you mean fit?"]),
        (["compare"], ["--config"]),
        ([*FIT, "--config", "+diagnostic"], ["'+diagnostic'", "did you mean +diagnostics?"]),
        (["fit", "--config", "wide_cf"], ["'wide_cf'", "did you mean wide_fc?"]),
        ([*FIT, "--model.widht", "3"], ["--model.widht:", "did you mean --model.width?"]),
        ([*FIT, "--data.bach_size=3"], ["--data.bach_size:", "did you mean --data.batch_size?"]),
        ([*FIT, "--trainer.max_epoch", "3"], ["--trainer.max_epoch:", "did you mean --trainer.max_epochs?"]),
        ([*FIT, "--trainer.accel", "cpu"], ["--trainer.accel:", "no such option"]),
        ([*FIT, "--lr", "3"], ["--lr:", "did you mean --model.lr?"]),
        ([*FIT, "oops"], ["'oops'"]),
        ([*FIT, "--model.lr", "fast"], ["--model.lr: expected float, got 'fast'"]),
        ([*FIT, "--model.method", "singulr"], ["--model.method:", "'singulr'", "did you mean singular?"]),
        ([*FIT, "--model", "WideFCC"], ["'WideFCC'", "did you mean WideFC?"]),
        ([*FIT, "--data", "DigitDataModule"], ["--data:", "did you mean DigitsDataModule?"]),
        (
            [*FIT, "--data", "lightning_conv.recipes.DigitData"],
            ["did you mean lightning_conv.recipes.DigitsDataModule?"],
        ),
        ([*FIT, "--trainer.callbacks+=LamdaMin"], ["--trainer.callbacks:", "did you mean LambdaMin?"]),
        (
            [*FIT, "--trainer.callbacks+=LambdaMin", "--trainer.callbacks.prob=3"],
            ["--trainer.callbacks.prob:", "did you mean --trainer.callbacks.probe?"],
        ),
        (
            [*FIT, "--trainer.callbacks+=LambdaMin", "--trainer.callbacks.every_n_steps=x"],
            ["--trainer.callbacks.every_n_steps: expected int or null, got 'x'"],
        ),
        ([*FIT, "--trainer.logger", "CSVLoger"], ["'CSVLoger'", "did you mean CSVLogger?"]),
        ([*FIT, "--trainer.accelerator", "gpuu"], ["gpuu"]),
        ([*FIT, "--config", "broken.yaml"], ["Problems parsing config"]),
        ([*FIT, "--config", "misspelt.yaml"], ["--trainer.max_epoch:", "did you mean --trainer.max_epochs?"]),
        ([*FIT, "--ckpt_path", "broken.yaml"], ["--ckpt_path: broken.yaml is no checkpoint"]),
        (["audit", "--config", "wide_fc", "--sample", "3"], ["did you mean --samples?"]),
        (["lab", "du", "--widht", "3"], ["lab du: --widht:", "did you mean --width?"]),
        (["lab", "oymak", "--n", "few"], ["lab oymak: --n: expected int, got 'few'"]),
        (["lab", "oymak", "--n", "-3"], ["lab oymak: n: -3"]),
        (["fit", "--config", "bn_resnet", "--model.arch", "resnet15"], ["arch", "resnet15", "resnet14"]),
        (["fit", "--config", "bn_resnet", "--data.batch_size", "1436"], ["batch_size", "1436"]),
        ([*FIT, "--data", "TorchvisionDataModule", "--data.dataset", "MNST"], ["did you mean MNIST"]),
        ([*FIT, "--data", "TorchvisionDataModule", "--data.root", "gone"], ["gone", "MNIST"]),
        (["test", "--config", "wide_fc", "--ckpt_path", "lost.ckpt"], ["lost.ckpt"]),
    ],
)
def test_an_error_of_the_user_is_one_line_without_a_traceback(args, words, capsys):
    Path("broken.yaml").write_text("trainer: [\n")
    Path("misspelt.yaml").write_text("trainer:\n  max_epoch: 3\n")
    assert main(args) == 2
    err = capsys.readouterr().err
    (message,) = lines_with(err, "lightning-conv: error:")
    assert all(word in message for word in words), message
    assert "Traceback" not in err


def test_weights_of_another_network_are_one_message(capsys):
    assert main([*FIT, *QUICK, "--model.guard", "false", "--model.diagnostics", "false", "--model.hidden", "[64]"]) == 0
    checkpoint = next(Path("runs").rglob("last.ckpt"))
    state = torch.load(checkpoint, weights_only=False)
    state["hyper_parameters"] = {}
    torch.save(state, "bare.ckpt")
    assert main(["test", "--config", "wide_fc", "--ckpt_path", "bare.ckpt", "--trainer.accelerator", "cpu"]) == 2
    (message,) = lines_with(capsys.readouterr().err, "lightning-conv: error:")
    assert "size mismatch" in message


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError, FileNotFoundError, ModuleNotFoundError])
def test_a_bug_in_the_code_of_the_user_keeps_its_traceback(error, tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "from lightning_conv.recipes import WideFC\n\n\nclass Mine(WideFC):\n"
        f"    def training_step(self, batch, batch_idx):\n        raise {error.__name__}('a bug')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    with pytest.raises(error, match="a bug"):
        main([*FIT, *QUICK, "--model", "my_model.Mine", "--model.guard=false", "--model.diagnostics=false"])


def test_a_bug_in_an_experiment_keeps_its_traceback(monkeypatch):
    def run(size: int = 3) -> None:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("lightning_conv.recipes.lab.command.experiment", lambda name: run)
    with pytest.raises(ValueError, match="broadcast"):
        main(["lab", "du"])


@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_public_callback_is_known_by_its_short_name(name):
    kind = getattr(callbacks, name)
    if isinstance(kind, type) and issubclass(kind, Callback):
        assert name in known_classes()
        assert kind in SHORT_NAMES_OF_CALLBACKS


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


@pytest.mark.parametrize("recipe", GUARDED)
def test_fit_closes_with_a_table_and_the_way_to_the_logs(recipe, capsys):
    assert main(["fit", "--config", recipe, *QUICK, *SMALL[recipe]]) == 0
    out = capsys.readouterr().out
    assert lines_with(out, "optimizer steps", "2 / 6")
    assert lines_with(out, "phase reached", "2 of 2")
    assert lines_with(out, "rank of [h, 1]", "179 / 179")
    assert lines_with(out, "fell in every phase-2 epoch", "yes, in all 1")
    assert lines_with(out, "lambda_min")
    folder = Path("runs", recipe, "guarded_0")
    assert lines_with(out, "logs: ", str(folder))
    assert lines_with(out, "tensorboard --logdir runs")
    assert (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_low_rank_adapters_are_fitted_by_name_and_a_second_run_finds_the_pre_trained_weights(capsys):
    words = ["fit", "--config", "lora", *QUICK, *SMALL["lora"], "--data.test_fraction", "0.1"]
    for number in range(2):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert lines_with(out, "optimizer steps", "2 / 8")
        assert lines_with(out, "logs: ", str(Path("runs", "lora", f"plain_{number}")))
        assert len(list(Path("runs", "pretrained").iterdir())) == 1
    assert len(list(Path("runs", "lora").rglob("convergence.html"))) == 2


def test_a_recipe_without_a_guard_is_not_compared_with_itself(capsys):
    assert main(["compare", "--config", "lora"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "lora has no guard" in message
    assert "bn_resnet, wide_fc" in message


def test_a_saved_configuration_repeats_the_run_and_its_checkpoint_is_tested(capsys):
    assert main(["fit", "--config", "wide_fc", *QUICK, "--model.guard", "false", "--model.diagnostics", "false"]) == 0
    folder = Path("runs", "wide_fc", "plain_0")
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    assert {each.name for each in folder.parent.iterdir()} == {"plain_0", "plain_1"}
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
@pytest.mark.parametrize("recipe", GUARDED)
def test_compare_prints_both_accuracies_and_their_difference_in_points(recipe, capsys):
    assert main(["compare", "--config", recipe, *QUICK, *SMALL[recipe], "--model.diagnostics", "false"]) == 0
    out = capsys.readouterr().out
    (row,) = lines_with(out, "test accuracy", "%")
    guarded, plain = (float(cell.strip().removesuffix("%")) for cell in row.split("|")[2:4])
    (difference,) = lines_with(out, "points")
    assert float(difference.split()[-2]) == pytest.approx(guarded - plain, abs=0.011)
    (steps,) = lines_with(out, "optimizer steps")
    assert steps.split("|")[2].strip() == steps.split("|")[3].strip()


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
