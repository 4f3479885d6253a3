"""The laboratory's frame: pages are written, violations end with code 1, mistakes get one message."""

import inspect
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_conv.recipes import lab
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.report import Check, Report
from lightning_conv.reporting.plots import new_figure

PAGES = Path(__file__).parents[3] / "docs" / "results" / "lab"


@pytest.fixture
def _invented(monkeypatch):
    def run(size: int = 3, good: bool = True) -> Report:
        if size < 1:
            raise ValueError(f"size: {size}; need 1 or more")
        checks = [Check("a <= b", "nobody", good, f"size {size}"), Check("c [h, 1]", "nobody", False, "-", must=False)]
        return Report("invented", "Invented", "Nothing.", checks, {"numbers": [{"x": 1.5, "y": True}]}, new_figure())

    monkeypatch.setitem(lab.EXPERIMENTS, "invented", "an experiment of the test")
    monkeypatch.setattr("lightning_conv.recipes.lab.command.experiment", lambda name: run)


@pytest.mark.usefixtures("_invented")
@pytest.mark.parametrize(("good", "code"), [("true", 0), ("false", 1)])
def test_a_violated_inequality_ends_with_code_1_and_the_page_says_so(tmp_path, capsys, good, code):
    assert main(["lab", "invented", "--size", "4", "--good", good, "--out", str(tmp_path)]) == code
    page = (tmp_path / "invented.md").read_text()
    assert f"lightning-conv lab invented --size 4 --good {good}" in page
    assert ("**NO**" in page) == (code == 1)
    assert "| 1.5 | yes |" in page
    stored = json.loads((tmp_path / "invented.json").read_text())
    assert stored["checks"][0]["seen"] == "size 4"
    assert (tmp_path / "invented.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "a <= b" in printed
    assert "c [h, 1]" in printed  # brackets are no markup


def test_what_is_no_finite_number_is_null_in_the_json(tmp_path):
    rows = [{"x": math.inf, "y": np.float64(-math.inf), "z": (1, math.nan)}]
    data = {"curve": torch.tensor([1.0, math.nan]), "flag": np.True_, 7: None}
    Report("odd", "Odd", "Nothing.", [], {"rows": rows}, data=data).write(tmp_path, "made by a test")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    stored = json.loads((tmp_path / "odd.json").read_text(), parse_constant=refuse)
    assert stored["tables"]["rows"] == [{"x": None, "y": None, "z": [1, None]}]
    assert stored["data"] == {"curve": [1.0, None], "flag": True, "7": None}
    assert stored["seconds"] is None


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.json")), ids=lambda page: page.stem)
def test_the_committed_pages_are_valid_json(page):
    text = page.read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{page.name} holds {word}"))


@pytest.mark.usefixtures("_invented")
@pytest.mark.parametrize("words", [["--good", "--size", "2"], ["--size", "2", "--good"], ["--size=2", "--good=true"]])
def test_a_flag_can_stand_alone(tmp_path, words):
    assert main(["lab", "invented", *words, "--out", str(tmp_path)]) == 0
    assert "size 2" in (tmp_path / "invented.md").read_text()


@pytest.mark.usefixtures("_invented")
@pytest.mark.parametrize(
    ("words", "message"),
    [(["nothing"], "no experiment 'nothing'"), (["invented", "--size", "0"], "size: 0; need 1 or more")],
)
def test_mistakes_get_one_message(capsys, words, message):
    assert main(["lab", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "slug"),
    [
        ("allen-zhu", "allen_zhu"), ("averaged-sgd", "averaged_sgd"), ("bias-ntk", "bias_ntk"), ("chatterjee", "chatterjee"),
        ("du", "du"), ("du --depth", "du_depth"), ("du-train", "du_train"), ("du2layer", "du_two_layer"), ("frei", "frei"),
        ("gclip", "clipping"), ("kawaguchi-sun", "kawaguchi_sun"), ("linear-networks", "linear_networks"),
        ("linear-regions", "linear_regions"), ("oymak", "oymak"), ("random-labels", "random_labels"), ("threshold", "threshold"),
    ],
)  # fmt: skip
def test_the_former_names_are_understood(words, slug):
    name, *rest = words.split()
    assert lab.resolve(name, [*rest, "--n", "4"]) == (slug, ["--n", "4"])
    assert lab.resolve(slug) == (slug, [])


def test_a_misspelt_name_gets_a_suggestion(capsys):
    assert main(["lab", "allen-zu"]) == 2
    message = capsys.readouterr().err
    assert "there is no experiment 'allen-zu'; did you mean allen_zhu" in message
    assert "threshold" in message


@pytest.mark.usefixtures("_invented")
def test_a_flag_can_be_denied(tmp_path):
    assert main(["lab", "invented", "--no_good", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("name", sorted(lab.EXPERIMENTS))
def test_small_settings_are_settings_and_the_report_has_the_name_of_the_experiment(name):
    run = lab.experiment(name)
    module = sys.modules[run.__module__]
    assert module.SMALL
    assert set(module.SMALL) <= set(inspect.signature(run).parameters)
    assert f'"{name}"' in inspect.getsource(module)


@pytest.mark.usefixtures("_invented")
def test_the_list_names_every_experiment(capsys):
    assert main(["lab"]) == 0
    assert all(name in capsys.readouterr().out for name in ["invented"])


def test_two_classes_have_unit_rows_and_balanced_targets():
    data = two_classes(10, classes=(3, 8))
    assert torch.allclose(data.inputs.norm(dim=1), torch.ones(10, dtype=torch.float64), rtol=1e-14)
    assert data.targets.tolist() == [-1.0, 1.0] * 5
    assert data.labels.tolist() == [3, 8] * 5
    with pytest.raises(ValueError, match="n: 3"):
        two_classes(3)
