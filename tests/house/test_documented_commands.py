"""What the pages print works as it is printed: every `lightning-conv ...` line is run, in the small setting of the environment."""

import re
import shlex
from pathlib import Path

import pytest
from tensorboard.program import TensorBoard

from lightning_conv.recipes.cli import main
from lightning_conv.recipes.commands import RUNS, overview, page
from lightning_conv.recipes.lab import EXPERIMENTS, resolve
from lightning_conv.recipes.paper_tables.command import EXAMPLES
from lightning_conv.recipes.small import VARIABLE
from lightning_conv.recipes.torchvision_data import SPLIT_ARGUMENT

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [
    *(page.read_text() for page in PAGES),
    *(path.read_text() for path in sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))),
    *(text[text.index("examples:") :] for text in (overview(), EXAMPLES, *(page(command).epilog for command in RUNS))),
]
PROGRAMS = r"(?:\.venv/bin/)?(lightning-conv|tensorboard|make)(?= )"


def printed(text: str) -> set[str]:
    """The commands of a page: lines of code blocks, and code within a sentence."""
    blocks = re.findall(rf"^(?:\s*\$ | {{2,}}|# .*: )?{PROGRAMS}([^`\n]*)$", text, re.MULTILINE)
    inline = re.findall(rf"`{PROGRAMS}([^`]+)`", text)
    return {" ".join(f"{program}{words.partition(' #')[0]}".split()) for program, words in [*blocks, *inline]}


ALL = set().union(*map(printed, TEXTS))
COMMANDS = sorted(command for command in ALL if command.startswith("lightning-conv "))


def is_slow(command: str) -> bool:
    """Whether another page runs the same experiment, or a recipe trains for more than a few seconds."""
    trains = (
        r"compare --config wide_fc|tables$|tables --data digits|--config bn_resnet(?!.*MNIST)|--config wide_fc --model"
    )
    takes_long = r"lab (allen_zhu|chatterjee|du|kawaguchi_sun)$"
    return "--out docs/results/lab" in command or bool(re.search(f"{trains}|{takes_long}", command))


def missing(words: list[str], folder: Path) -> str | None:
    """What a command asks for that is not on this machine: a placeholder, a run, or a data set that is never downloaded."""
    if words == ["fit"]:
        return "needs a configuration"
    if "my_package.MyModule" in words:
        return "my_package"
    holes = [word for word in words if re.fullmatch("[A-Z]+", word) and word not in SPLIT_ARGUMENT]
    if holes:
        return holes[0]
    if words[0] == "report" and "--help" not in words:  # of runs that were made before
        return next(word for word in words if word.startswith("runs/"))
    asked = set(words) & set(SPLIT_ARGUMENT) or any("mnist" in word for word in words)
    return str(folder / "data") if asked else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [pytest.param(each, marks=pytest.mark.slow if is_slow(each) else ()) for each in COMMANDS]
)
def test_a_printed_command_works_or_names_what_is_missing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "1")
    words = shlex.split(command)[1:]
    gone = missing(words, tmp_path)
    code = main(words)
    message = capsys.readouterr().err
    if gone is None:
        assert code == 0, message
    else:
        assert code == 2
        assert gone in message
        assert message.count("lightning-conv: error: ") == 1


def test_every_experiment_and_command_is_printed_somewhere():
    words = [command.split()[1:] for command in COMMANDS]
    assert {"fit", "compare", "tables", "lab"} <= {first for first, *_ in words}
    named = {resolve(rest[0], rest[1:])[0] for first, *rest in words if first == "lab" and rest and rest[0] != "NAME"}
    assert named == set(EXPERIMENTS)


def test_the_printed_targets_of_make_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {word for command in ALL if command.startswith("make ") for word in command.split()[1:] if "=" not in word}
    assert {"demo", "test"} <= asked <= targets


def test_the_printed_calls_of_tensorboard_are_understood():
    calls = [shlex.split(command) for command in ALL if command.startswith("tensorboard ")]
    assert calls
    for words in calls:
        assert TensorBoard().configure(words) is not None
