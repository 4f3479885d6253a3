"""The Kawaguchi-Sun and Oymak experiments end to end, tiny: what is proven holds, what is not is not claimed."""

import json

import pytest

from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab.kawaguchi_sun import experiment as kawaguchi_sun
from lightning_conv.recipes.lab.oymak import experiment as oymak


def test_phase_two_keeps_its_bounds_and_a_narrow_head_its_floor(tmp_path):
    report = kawaguchi_sun.run(n=40, width=60, narrow=20, first=60, steps=200)
    assert not report.violated
    features = report.tables["Features"]
    assert [row["features"] for row in features[:3]] == ["wide, at the start", "wide, at tau", "wide, after the noise"]
    assert {row["rank at least"] for row in features[:3]} == {40}
    phase = report.data["phase 1"]["wide"]
    assert phase["step"][0] == 0
    assert phase["step"][-2:] == [60, 60]  # at tau, before and after the noise
    assert phase["loss"][-2] < phase["loss"][0]
    assert phase["sigma_min"][-1] != phase["sigma_min"][-2]
    held = {check.claim: check.holds for check in report.checks}
    assert held["wide: rank [h, 1] = n, that is sigma_min([h, 1]) > 0"]
    assert not held["narrow: rank [h, 1] = n, that is sigma_min([h, 1]) > 0"]
    wide, entropy, narrow = report.tables["Descents"]
    assert wide["loss in the end"] <= min(wide["bound in the end"], wide["linear bound in the end"])
    assert entropy["loss in the end"] <= entropy["bound in the end"]
    assert 0 < narrow["floor"] <= narrow["loss in the end"]
    page = report.write(tmp_path, "made by a test")
    assert page.with_suffix(".png").stat().st_size > 0
    json.loads(page.with_suffix(".json").read_text())


def test_the_line_is_proven_for_one_network_and_only_claimed_for_another(tmp_path):
    report = oymak.run(n=4, width=128, output_weight=60.0, until=1e-4, max_steps=4000)
    assert not report.violated
    assert report.checks[0].seen.startswith("certified")
    claimed = [check for check in report.checks if not check.must]
    assert any(not check.holds for check in claimed)
    assert all("torch's own" in check.claim for check in claimed)
    assert report.write(tmp_path, "made by a test").with_suffix(".png").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["oymak", "--width", "7"], "width: 7"),
        (["kawaguchi-sun", "--n", "50", "--width", "30"], "n, width, narrow: 50, 30"),
    ],
)
def test_mistakes_get_one_message(capsys, words, message):
    assert main(["lab", *words]) == 2
    assert message in capsys.readouterr().err
