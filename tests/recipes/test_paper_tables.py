"""What `lightning-conv tables` promises: figures that are those of the runs, a kill that costs one run, and clear refusals."""

import json
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_conv.recipes import BNResNet, DigitsDataModule, bn_resnet
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.paper_tables.cells import RECIPES, certificate_at_start
from lightning_conv.recipes.paper_tables.ledger import Cell, Ledger
from lightning_conv.recipes.paper_tables.page import judgement, render

TINY = ["--n", "60", "--epochs", "3", "--accelerator", "cpu", "--out", "out"]
SMALL_RESNET = ["--set", "bn_resnet.arch=resnet8", "--set", "bn_resnet.channels=4"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tables(*words):
    return main(["tables", *words])


def results(folder="out"):
    """{(recipe, augment, seed, guard): result}."""
    stored = json.loads((Path(folder) / "paper_tables.json").read_text())
    names = ("recipe", "augment", "seed", "guard")
    return {tuple(entry["cell"][name] for name in names): entry["result"] for entry in stored["cells"]}


def row(page, *words):
    (line,) = [
        line for line in page.splitlines() if line.startswith("| digits") and all(word in line for word in words)
    ]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_both_tables_show_what_the_runs_gave(capsys):
    words = [*TINY, *SMALL_RESNET, "--seeds", "2", "--augment", "both"]
    assert tables(*words) == 0
    done = capsys.readouterr()
    page = Path("out", "paper_tables.md").read_text()
    assert done.out == page
    assert "16/16 digits bn_resnet, augmented, seed 1, guarded" in done.err
    assert f"lightning-conv tables {' '.join(words)}" in page
    found = results()
    assert len(found) == 16
    for recipe in RECIPES:
        for augment in (False, True):
            errors = [
                [100 * found[recipe, augment, seed, guard]["test_error"] for seed in (0, 1)] for guard in (False, True)
            ]
            cells = row(page, recipe, "yes" if augment else "no", "±")
            spread = [f"{np.mean(pair):.2f} ± {np.std(pair, ddof=1):.2f}" for pair in errors]
            assert cells[6:8] == spread
            assert cells[8].startswith(f"{np.mean(errors[1]) - np.mean(errors[0]):+.2f}")
            assert cells[-1] == "2 of 2"
        certificates = [found[recipe, False, seed, True][when] for seed in (0, 1) for when in ("start", "switch")]
        assert all((fact["verdict"], fact["rank"], fact["n"]) == ("certified", 60, 60) for fact in certificates)
        cells = row(page, recipe, "60 / 60")
        assert (cells[1], cells[3]) == ("60", "66")
        assert cells[5:7] == ["2 of 2 certified", "60 / 60"]
        least = min(found[recipe, False, seed, True]["switch"]["sigma_min"]["lower"] for seed in (0, 1))
        assert f"{least:.2e}" in cells[10]
        # Both runs of a pair are one and the same until the switch, and the guard's second phase goes on falling.
        losses = found[recipe, False, 0, True]["losses"]
        assert losses[-1] == pytest.approx(found[recipe, False, 0, True]["train_loss"], rel=1e-4)
        assert losses[-1] < losses[0]


def test_a_guard_that_declines_leaves_the_base_run_and_the_page_says_why(capsys):
    assert tables(*TINY, "--recipes", "wide_fc", "--seeds", "1", "--augment", "off", "--set", "wide_fc.width=12") == 0
    found = results()
    base, guarded = found["wide_fc", False, 0, False], found["wide_fc", False, 0, True]
    for name in ("test_error", "test_loss", "train_loss"):
        assert base[name] == guarded[name]
    page = Path("out", "paper_tables.md").read_text()
    assert "`wide_fc`, width = 12" in page
    assert "no switch: too narrow" in page
    assert row(page, "one seed")[-1] == "0 of 1"


@pytest.mark.slow
def test_a_killed_command_goes_on_with_the_runs_that_are_missing(tmp_path, capsys):
    words = [*TINY, "--recipes", "wide_fc", "--seeds", "2", "--augment", "off"]
    code = f"""
import os, signal
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.paper_tables import cells
run, done = cells.run_cell, []
def lethal(*args):
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(run(*args))
    return done[-1]
cells.run_cell = lethal
main({["tables", *words]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(results()) == 3
    before = results()
    assert tables(*words) == 0
    assert "4 runs, of which 3 are in" in capsys.readouterr().err
    assert {key: results()[key] for key in before} == before

    assert tables(*words[:-8], "--out", "whole", *words[-6:]) == 0
    whole = results("whole")
    assert whole.keys() == results().keys()
    for key, result in results().items():
        for name in result.keys() - {"seconds"}:
            assert result[name] == whole[key][name], (key, name)
    page = Path("out", "paper_tables.md").read_text()
    assert page.count("`lightning-conv tables") == 2  # both commands, with the number of runs of each
    assert tables(*words) == 0
    assert "4 runs, of which 4 are in" in capsys.readouterr().err
    assert Path("out", "paper_tables.md").read_text() == page


def test_the_certificate_at_the_start_is_about_the_features_under_the_statistics_of_the_samples():
    torch.manual_seed(0)
    network = bn_resnet(1, 10, width=50, arch="resnet8", channels=4)
    data = DigitsDataModule(n_train=40)
    data.setup()
    inputs = data.splits.train.tensors[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    certificate = certificate_at_start(network, inputs)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    # By train mode itself, on all samples at once, in float64.
    twin = network.double().train()
    entered = []
    twin.fc.head.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    twin(inputs.double())
    sigma = np.linalg.svd(np.hstack([entered[0].detach().numpy(), np.ones((40, 1))]), compute_uv=False)
    assert certificate.verdict == "certified"
    assert certificate.sigma_min.lower <= sigma[39] <= certificate.sigma_min.upper
    assert certificate.sigma_max.value == pytest.approx(sigma[0], rel=1e-9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "digit"], ["data: 'digit'", "did you mean digits?"]),
        (["--data", ","], ["name at least one of each"]),
        (["--data", "MNIST", "--root", "gone"], ["MNIST", "gone"]),
        (["--recipes", "wide"], ["'wide'", "bn_resnet, wide_fc"]),
        (["--seeds", "0"], ["--seeds", "at least 1"]),
        (["--seeds", "x"], ["--seeds", "must be a whole number, got 'x'"]),
        (["--set", "wide_fc.lr"], ["RECIPE.NAME=VALUE"]),
        (["--set", "wide_fc.widht=3"], ["no setting 'widht'", "width"]),
        (["--set", "wide_fc.lr=fast"], ["wide_fc.lr='fast'", "0.1"]),
        (["--set", "wide_fc.guard=false"], ["guard is what the tables compare"]),
        (
            ["--set", "bn_resnet.arch=resnet8", "--recipes", "wide_fc"],
            ["'bn_resnet' is not among the recipes that are run"],
        ),
        (["--set", "bn_resnet.arch=resnet9", "--recipes", "bn_resnet"], ["arch: 'resnet9'"]),
        (["--seed", "3"], ["--seed", "tables --help"]),
        (["--out", "taken"], ["taken", "holds no results"]),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_written(words, said, capsys):
    Path("taken").mkdir()
    Path("taken", "paper_tables.json").write_text('{"cells": 3}')
    assert tables(*TINY, *words) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "lightning-conv: error:" in line]
    assert all(word in message for word in said)
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["paper_tables.md", "paper_tables.json"])
@pytest.mark.parametrize("content", [b"# My thesis\n", b"\xff\xfe\x00"], ids=["text", "binary"])
def test_a_file_of_somebody_else_is_left_alone(name, content, capsys):
    Path("mine").mkdir()
    Path("mine", name).write_bytes(content)
    assert tables(*TINY, "--output", "mine") == 2
    message = capsys.readouterr().err
    assert str(Path("mine", name)) in message
    assert "another folder" in message
    assert Path("mine", name).read_bytes() == content
    assert [path.name for path in Path("mine").iterdir()] == [name]


def test_a_place_where_nothing_can_be_written_is_refused_before_the_first_run(capsys):
    Path("file").write_text("")
    assert tables(*TINY, "--output", str(Path("file", "below"))) == 2
    assert "file is no folder); name another folder by --out" in capsys.readouterr().err


def test_the_folder_is_the_one_that_is_named_and_both_files_are_said(capsys):
    words = [
        "--n",
        "40",
        "--epochs",
        "1",
        "--accelerator",
        "cpu",
        "--recipes",
        "wide_fc",
        "--seeds",
        "1",
        "--augment",
        "off",
    ]
    assert tables(*words, "--output", "here/there") == 0
    page, results = Path("here/there/paper_tables.md"), Path("here/there/paper_tables.json")
    assert f"written: {page}, {results}" in capsys.readouterr().err
    assert page.is_file()
    assert results.is_file()
    assert [path.name for path in Path().iterdir()] == ["here"]


def test_means_are_within_the_larger_standard_deviation_or_beyond_it():
    base, shift = [1.0, 2.0, 4.5], statistics.stdev([1.0, 2.0, 4.5])
    assert judgement(base, [value + 0.99 * shift for value in base]) == "within"
    assert judgement(base, [value - 1.01 * shift for value in base]) == "beyond"
    assert judgement([1.0, 1.0], [1.0, 1.0]) == "within"
    assert judgement([1.0], [2.0]) == "one seed"


def certificate(verdict, rank, lower, upper):
    sigma = {"value": 1e-3, "lower": lower, "upper": upper}
    return {"verdict": verdict, "rank": rank, "n": 9, "width": 10, "method": "singular", "reason": f"because {verdict}",
            "sigma_min": sigma, "sigma_max": sigma}  # fmt: skip


def test_the_page_shows_the_worst_certificate_and_why_a_condition_is_undecided():
    ledger = Ledger(Path("nowhere.json"))
    ledger.begin(["--data", "digits"])
    ledger.runs.append(ledger._run)
    named = {"data": "digits", "n": 9, "recipe": "wide_fc", "changed": {}, "epochs": 2, "augment": False}
    shared = {"width": 10, "test_error": 0.5, "train_loss": 1.0, "seconds": 60.0}
    facts = [certificate("certified", 9, 9e-4, 2e-3), certificate("undecided", 8, 0.0, None)]
    for seed, fact in enumerate(facts):
        guarded = {"start": facts[0], "switch": fact, "phase": 2 - seed, "reason": fact["reason"]}
        for guard in (False, True):
            result = {**shared, **(guarded if guard else {})}
            ledger.cells.append({"cell": {**named, "seed": seed, "guard": guard}, "run": 0, "result": result})
    page = render(ledger)
    cells = row(page, "8 / 9")
    assert cells[5:8] == ["2 of 2 certified", "9 / 9", "1.00e-03 in [9.00e-04, 2.00e-03]"]
    assert cells[8:11] == ["1 of 2 certified, 1 of 2 undecided", "8 / 9", "1.00e-03 in [0.00e+00, unbounded]"]
    assert "- digits, `wide_fc`, seed 1, switch: undecided: because undecided" in page
    assert row(page, "within")[-1] == "1 of 2"
    assert "4 runs, 4 minutes of training" in page


def cell(seed):
    return Cell(data="digits", n=9, n_test=None, recipe="wide_fc", settings={"hidden": (8,)}, changed={}, batch_size=4, epochs=1,
                augment=False, seed=seed, guard=False)  # fmt: skip


def test_two_commands_may_fill_one_file():
    first, second = Ledger.read(Path("both.json")), Ledger.read(Path("both.json"))
    first.begin(["--seeds", "1"])
    second.begin(["--seeds", "2"])
    for seed, ledger in enumerate((first, second, first)):
        ledger.keep(cell(seed), {"test_error": seed})
    stored = Ledger.read(Path("both.json"))
    assert [stored.result(cell(seed)) for seed in range(4)] == [
        {"test_error": 0},
        {"test_error": 1},
        {"test_error": 2},
        None,
    ]
    assert [entry["run"] for entry in stored.cells] == [0, 1, 0]
    assert [run["command"][-1] for run in stored.runs] == ["1", "2"]
    assert [path.name for path in Path().iterdir()] == ["both.json"]


def test_recipes_of_the_tables_are_those_of_the_command():
    from lightning_conv.recipes.named_configs import guarded_recipe_names

    assert sorted(RECIPES) == guarded_recipe_names()
    assert RECIPES["bn_resnet"] is BNResNet


COMMITTED = Path(__file__).parents[2] / "docs" / "results"


def test_the_committed_tables_are_what_the_command_prints_and_are_not_run_again(capsys):
    """They were written before the recipes had the guard's method, step rule and feature cache as settings."""
    Path("out").mkdir()
    stored = json.loads((COMMITTED / "paper_tables.json").read_text())
    Path("out", "paper_tables.json").write_text(json.dumps(stored))
    assert tables("--data", "digits", "--seeds", "5", "--out", "out") == 0
    done = capsys.readouterr()
    assert "40 runs, of which 40 are in" in done.err
    assert done.out == (COMMITTED / "paper_tables.md").read_text()


def test_settings_that_cells_were_written_without_are_what_was_done_then_and_a_cache_is_no_other_training():
    old = cell(0)
    names = ("method", "step_rule", "cache_features")
    Path("old.json").write_text(
        json.dumps({"runs": [{}], "cells": [{"cell": asdict(old), "run": 0, "result": {"test_error": 0.5}}]})
    )
    ledger = Ledger.read(Path("old.json"))
    assert [ledger.cells[0]["cell"]["settings"][name] for name in names] == ["auto", "base", False]

    def now(changed, **settings):
        new = {"method": "auto", "step_rule": "base", "cache_features": True} | settings
        return replace(old, settings=old.settings | new, changed=changed)

    assert ledger.result(now({})) == {"test_error": 0.5}
    assert ledger.result(now({"cache_features": False}, cache_features=False)) == {"test_error": 0.5}
    assert ledger.result(now({"step_rule": "solve"}, step_rule="solve")) is None
    assert ledger.result(now({"method": "distinct"}, method="distinct")) is None
    assert ledger.result(replace(now({}), seed=1)) is None
