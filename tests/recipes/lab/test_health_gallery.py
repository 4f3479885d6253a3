"""A third of the health gallery: each illness is named, and no healthy run is accused."""

from __future__ import annotations

import json

import pytest

from lightning_conv.callbacks.run.guarded import set_strict
from lightning_conv.health.finding import Finding
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab.health.case import GalleryCase, Said
from lightning_conv.recipes.lab.health.gallery import run
from lightning_conv.recipes.lab.health.healthy_runs import HEALTHY
from lightning_conv.recipes.lab.health.sick_runs import SICK
from lightning_conv.recipes.lab.health.training import is_said, train_case

CASES = {each.name: each for each in (*SICK, *HEALTHY)}
THIRD = [
    "rate_far_too_large", "duplicates", "dead_layer", "exploding_start", "inputs_times_1000", "frozen_group", "wrong_sign",
    "fine_tuning", "momentum", "likelihood", "warm_up",
]  # fmt: skip


@pytest.fixture
def _lenient():
    set_strict(False)  # a run that ends in NaN has errors that are expected
    yield
    set_strict(True)


@pytest.mark.usefixtures("_lenient")
@pytest.mark.parametrize("name", THIRD)
def test_an_illness_is_named_and_a_healthy_run_is_not_accused(name):
    case, seed = CASES[name], 11  # a seed that is not among those of the page
    found = train_case(case, seed)
    if case.healthy:
        assert found.above == (), found.sentence
    else:
        assert found.hit, found.above
        assert found.when <= found.steps / 2


def test_the_gallery_has_runs_enough_and_no_name_twice():
    assert len(CASES) == len(SICK) + len(HEALTHY)
    assert len(SICK) >= 12
    assert len(HEALTHY) >= 8
    assert 3 * len(THIRD) >= len(CASES)
    assert all(each.said for each in SICK)
    assert not any(each.said for each in HEALTHY)


def test_what_has_to_be_said_is_a_name_a_level_and_words():
    case = GalleryCase("a", "b", SICK[0].make, (Said("units", "warning", "dead"),))
    said = Finding(name="units", level="alert", sentence="All 3 units are dead.")
    assert is_said(case, said)
    assert not is_said(case, Finding(name="units", level="notice", sentence="All 3 units are dead."))
    assert not is_said(case, Finding(name="layers", level="alert", sentence="All 3 units are dead."))
    assert not is_said(case, Finding(name="units", level="alert", sentence="All 3 units are saturated."))


def line(case, seed, **rest):
    """A line of the file in which results are kept."""
    return json.dumps({"key": f"{case}/{seed}", "result": {"case": case, "seed": seed, **rest}}) + "\n"


def test_what_is_kept_is_not_trained_again_and_a_miss_fails(tmp_path):
    keep = tmp_path / "kept.jsonl"
    words = [
        "lab",
        "health-gallery",
        "--seeds",
        "2",
        "--only",
        "[frozen_group]",
        "--keep",
        str(keep),
        "--out",
        str(tmp_path),
    ]
    rest = {"steps": 9, "hit": True, "when": 3, "sentence": "It is.", "above": ["movement"]}
    missed = rest | {"hit": False, "when": None, "sentence": ""}
    keep.write_text(line("frozen_group", 0, **rest) + line("frozen_group", 1, **missed) + '{"key": "cut')
    before = keep.read_text()
    assert main(words) == 1
    page = (tmp_path / "health_gallery.md").read_text()
    assert "| **NO** | frozen_group: movement (warning) is said | in 1 of 2 |" in page
    assert "2 runs are kept from an earlier call." in page
    assert keep.read_text() == before
    keep.write_text(line("warm_up", 0, **missed | {"sentence": "Bad.", "above": ["units"]}))
    (accused,) = run(seeds=1, only=["warm_up"], keep=str(keep)).violated
    assert accused.seen == "accused in 1 of 1"


@pytest.mark.usefixtures("_lenient")
def test_what_was_trained_is_kept_behind_a_line_that_was_cut(tmp_path):
    keep = tmp_path / "kept.jsonl"
    other = {"steps": 9, "hit": True, "when": 3, "sentence": "It is.", "above": []}
    keep.write_text(line("dead_layer", 0, **other) + line("nan_in_data", 0, **other)[:-9])  # a process was killed
    report = run(seeds=1, only=["nan_in_data"], keep=str(keep))
    assert not report.violated
    assert "1 run is kept from an earlier call." in report.setting
    first, cut, last = keep.read_text().splitlines()
    assert json.loads(first)["key"] == "dead_layer/0"
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut)
    assert json.loads(last)["key"] == "nan_in_data/0"
    before = keep.read_text()
    again = run(seeds=1, only=["dead_layer", "nan_in_data"], keep=str(keep))
    assert keep.read_text() == before  # both are known
    assert again.data["runs"][1] == report.data["runs"][0]


def test_a_file_of_something_else_is_not_written_to(tmp_path):
    keep = tmp_path / "kept.jsonl"
    keep.write_text('{"case": "dead_layer", "seed": 0}\n')
    with pytest.raises(ValueError, match=r"keep: line 1 of .*kept.jsonl is no result of a study; name another file"):
        run(seeds=1, only=["dead_layer"], keep=str(keep))
    assert keep.read_text() == '{"case": "dead_layer", "seed": 0}\n'


@pytest.mark.parametrize(("settings", "message"), [({"seeds": 0}, "seeds: 0"), ({"only": ["nobody"]}, "no run nobody")])
def test_mistakes_say_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)
