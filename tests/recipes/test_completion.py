"""Shell completion: what the tabulator key offers in bash and zsh, that it agrees with the parsers, and that nothing heavy is loaded."""

import inspect
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_conv.recipes import runs
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.commands import COMMANDS, DATA, MODELS, RUNS
from lightning_conv.recipes.completion import SHELLS, options_of, script, trainer_settings

ASK = """
source ./script
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_lightning_conv
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""Completes the last of its arguments, as bash does."""
BARE = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}
"""How an interactive shell starts without the files of the user."""


def installed(shell: str) -> str:
    """Path of a shell; without it the test is skipped."""
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


@pytest.fixture
def offered(tmp_path):
    """What bash offers for the last of some words."""
    shell = installed("bash")
    (tmp_path / "script").write_text(script("bash"))
    (tmp_path / "own.yaml").write_text("")
    (tmp_path / "runs").mkdir()

    def ask(*words: str) -> list[str]:
        command = [shell, "--norc", "-c", ASK, "ask", "lightning-conv", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    return ask


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["f"], ["fit"]),
        (["co"], ["compare", "configs", "completion"]),
        (["fit", "--config", "wi"], ["wide_fc"]),
        (["fit", "--config", "+d"], ["+diagnostics"]),
        (["fit", "--config", "wide_fc", "-c", "own"], ["own.yaml"]),
        (["fit", "--config", "wide_fc", "--trainer.max_e"], ["--trainer.max_epochs"]),
        (["fit", "--config", "wide_fc", "--model.wi"], ["--model.width", "--model.width_factor"]),
        (["compare", "--config", "wide_fc", "--data.b"], ["--data.batch_size"]),
        (["test", "--config", "wide_fc", "--mode"], ["--model", "--model.help"]),
        (["fit", "--config", "wide_fc", "--model", "W"], ["WideFC"]),
        (["audit", "--sam"], ["--samples"]),
        (["lab", "du_t"], ["du_train", "du_two_layer"]),
        (["report", "ru"], ["runs"]),
        (["report", "--c"], ["--compare"]),
        (["check", "--js"], ["--json"]),
        (["check", "--trainer.max_e"], ["--trainer.max_epochs"]),
        (["tables", "--au"], ["--augment"]),
        (["tables", "--output", "ru"], ["runs"]),
        (["completion", "z"], ["zsh"]),
        (["nothing", "x"], []),
    ],
    ids=" ".join,
)
def test_the_tabulator_key_offers(offered, words, expected):
    answer = set(offered(*words))
    assert set(expected) <= answer
    assert all(each.startswith(words[-1]) for each in answer)
    if len(words) < 3 and words[0] not in ("report", "tables", "audit"):
        assert answer == set(expected)


def test_bash_completes_behind_an_equals_sign(offered):
    """Bash splits `--config=wide` into three words."""
    assert offered("fit", "--config", "=", "wi") == ["wide_fc"]
    assert "wide_fc" in offered("fit", "--config", "=")


class Terminal:
    """An interactive shell on a terminal of its own, to press keys in."""

    def __init__(self, shell: str, folder: Path) -> None:
        self.process, self.master = None, None
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PS1": "$ ", "HOME": str(folder)}
        self.process = subprocess.Popen(
            [installed(shell), *BARE[shell]],
            cwd=folder,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str) -> bool:
        """Read until a text is there; give up when nothing has come for a while."""
        while text not in self.seen and select.select([self.master], [], [], 60)[0]:
            self.seen += os.read(self.master, 1000).decode(errors="replace")
        return text in self.seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_key_itself_completes_in_an_interactive_shell(shell, tmp_path):
    installed(shell)
    (tmp_path / "script").write_text(script(shell))
    terminal = Terminal(shell, tmp_path)
    try:
        terminal.press("source ./script && echo rea''dy\n")
        assert terminal.wait_for("ready")
        terminal.seen = terminal.seen.partition("ready")[2]
        assert terminal.wait_for("$ ")
        for typed, whole in (("lightning-conv compa", "compare"), (" --config wi", "wide_fc"), (" --model.be", "beta")):
            terminal.press(typed)
            assert terminal.wait_for(typed), terminal.seen  # a key pressed too early is no key but text
            terminal.press("\t")
            assert terminal.wait_for(whole), terminal.seen
    finally:
        terminal.close()


def test_the_options_are_those_of_the_parsers():
    assert trainer_settings() == list(inspect.signature(Trainer).parameters)
    assert {kind.__name__ for kind in runs.SHORT_NAMES} == {*MODELS, *DATA}
    for kind in runs.SHORT_NAMES:
        section = "model" if kind.__name__ in MODELS else "data"
        if kind.__name__ != "TextDataModule" and kind.__name__ != "TorchvisionDataModule":  # the recipes use neither
            wanted = {f"--{section}.{name}" for name in inspect.signature(kind).parameters}
            assert wanted <= set(options_of("fit"))
    for command in RUNS:
        assert {"--config", "--model", "--data", "--print_config", "--help-all"} <= set(options_of(command))
    assert not [option for command in COMMANDS for option in options_of(command) if "NAME" in option]


def test_an_unknown_shell_is_one_message(capsys):
    assert main(["completion", "fish"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "fish" in message
    assert "zsh" in message
    assert main(["completion"]) == 2
    assert "shell" in capsys.readouterr().err


def test_printing_the_script_loads_nothing_heavy():
    code = (
        "import sys\nfrom lightning_conv.recipes.cli import main\nassert main(['completion', 'bash']) == 0\n"
        "print(*({'torch', 'lightning', 'jsonargparse', 'rich', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == script("bash")
    assert done.stderr.strip() == ""
