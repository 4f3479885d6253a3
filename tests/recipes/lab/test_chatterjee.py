"""The Chatterjee experiment end to end, tiny: what is proven holds, what is not is not claimed."""

import json

import pytest

from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab.chatterjee.experiment import run


@pytest.mark.slow
def test_the_certified_descent_holds_and_the_random_start_is_refuted(tmp_path):
    report = run(n=4, width=8, until=1e-6, max_steps=3000, radii=21, widest=4096, wide_steps=200)
    assert not report.violated
    held = {check.claim: check.holds for check in report.checks}
    assert held["f_k <= (1 - delta)^k f_0 at every step"]
    assert held["no ratio found in a ball lies below the proven alpha"]
    assert not held["torch's own initialisation: 4 f(x_0) < r^2 alpha(x_0, r) for some r"]
    certified = report.tables["Runs"][0]
    assert certified["f in the end"] <= 1e-6
    assert certified["farthest"] <= certified["path length"] <= report.tables["Certificate"][0]["path length <="]
    page = report.write(tmp_path, "made by a test")
    assert page.with_suffix(".png").stat().st_size > 0
    curves = json.loads(page.with_suffix(".json").read_text())["data"]["curves"]
    random_weights = curves.pop("random weights")
    assert all(a >= b for c in curves.values() for a, b in zip(c["alpha at most"], c["alpha at least"], strict=True))
    rows = report.tables["Random weights, by width"]
    assert [row["units"] for row in rows] == [256, 512, 1024, 2048, 4096]
    assert all("Lipschitz" in row["by"] for row in rows)
    assert rows[-1]["score (descent)"] > 1
    for step, loss in zip(random_weights["step"], random_weights["loss"], strict=True):
        assert loss <= random_weights["loss"][0] * (1 - rows[-1]["delta per step"]) ** step * (1 + 1e-9)


@pytest.mark.slow
def test_a_narrow_random_network_is_not_certified_and_does_not_descend():
    report = run(n=4, width=4, until=1e-2, max_steps=2000, radii=3, widest=32)
    assert not report.violated
    claim = next(check for check in report.checks if check.claim.startswith("random weights, 32 units"))
    assert (claim.holds, claim.must) == (False, False)
    assert not any("certified step" in check.claim for check in report.checks)


@pytest.mark.slow
def test_a_run_that_does_not_arrive_is_a_violation():
    report = run(n=4, width=4, until=1e-12, max_steps=20, radii=3, widest=32)
    assert [check.claim for check in report.violated] == ["f <= 1e-12 in the end"]


def test_three_layers_are_certified_too():
    assert not run(n=4, width=4, depth=3, until=1e-2, max_steps=2000, radii=3, widest=32).violated


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--depth", "1"], "depth: 1"), (["--n", "80"], "not proven independent"), (["--widest", "40"], "widest: 40")],
)
def test_mistakes_get_one_message(capsys, words, message):
    assert main(["lab", "chatterjee", *words]) == 2
    assert message in capsys.readouterr().err
