"""The laboratory's experiments on Du et al., end to end in tiny settings; their pages say what was seen."""

import json
import math

import pytest
import torch

from lightning_conv import h_infinity
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab import du, du2layer, du_depth, random_labels
from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.two_layer_run import train
from lightning_conv.theory import DuTwoLayer


def page(folder, name):
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return (folder / f"{name}.md").read_text(), json.loads((folder / f"{name}.json").read_text())


def test_du2layer_end_to_end(tmp_path):
    words = ["--n", "10", "--widths", "[128,512,2048]", "--draws", "8", "--steps", "120"]
    code = main(["lab", "du2layer", *words, "--out", str(tmp_path)])
    text, stored = page(tmp_path, "du2layer")
    checks = {check["claim"]: check for check in stored["checks"]}
    assert code == int(any(check["must"] and not check["holds"] for check in checks.values()))
    rate = next(check for claim, check in checks.items() if "at every step" in claim)
    assert rate["holds"]
    lambda_0 = stored["data"]["lambda_0"][1]
    assert lambda_0 == pytest.approx(float(torch.linalg.eigvalsh(h_infinity(two_classes(10).inputs))[0]), rel=1e-9)
    residuals = stored["data"]["largest width"]["residuals"]
    assert len(residuals) == 121
    share = 1 - stored["data"]["eta"] * lambda_0 / 2
    assert all(r**2 <= share**k * residuals[0] ** 2 for k, r in enumerate(residuals))
    assert "| 2048 |" in text


def test_the_fitted_slope_is_that_of_a_power_law():
    gaps = {m: [3 * m**-0.5 * factor for factor in (0.8, 1.25)] for m in (10, 100, 1000)}
    slope, error = du2layer.fit_slope(gaps)
    assert slope == pytest.approx(-0.5, abs=1e-12)
    points = [(math.log(m), math.log(g)) for m, values in gaps.items() for g in values]
    x, y = torch.tensor(points, dtype=torch.float64).T
    design = torch.stack([x, torch.ones_like(x)], 1)
    solution, *_ = torch.linalg.lstsq(design, y[:, None], driver="gelsd")
    rest = y - design @ solution[:, 0]
    covariance = torch.linalg.inv(design.T @ design) * float(rest @ rest) / 4
    assert error == pytest.approx(math.sqrt(float(covariance[0, 0])), rel=1e-8)


def test_a_step_size_far_too_large_breaks_the_bound_and_the_command_says_so(tmp_path):
    """Beyond 2 / lambda_max the error grows, so the theorem's rate is violated: exit code 1."""
    words = ["--n", "10", "--widths", "[64,128]", "--draws", "2", "--steps", "30", "--eta", "2.0"]
    assert main(["lab", "du2layer", *words, "--out", str(tmp_path)]) == 1
    text, _ = page(tmp_path, "du2layer")
    assert "| **NO** | \\|u(k) - y\\|^2 <=" in text


def test_random_labels_end_to_end(tmp_path):
    words = ["--n", "10", "--tests", "20", "--width", "4096", "--steps", "600"]
    assert main(["lab", "random-labels", *words, "--out", str(tmp_path)]) == 0
    _, stored = page(tmp_path, "random-labels")
    for name in ("true", "random"):
        data = stored["data"][name]
        assert data["wrong"][-1] == 0
        assert data["residuals"][0] == pytest.approx(math.sqrt(10), rel=1e-9)  # u(0) = 0
        assert sum(data["shares"]) == pytest.approx(1.0)
    assert {row["labels"] for row in stored["tables"]["Both label vectors"]} == {"true", "random"}


def test_symmetric_neurons_cancel_at_the_start():
    network = DuTwoLayer(4, 10, symmetric=True)
    assert network(torch.randn(3, 4, dtype=torch.float64)).abs().max() < 1e-14
    with pytest.raises(ValueError, match="width: 9"):
        DuTwoLayer(4, 9, symmetric=True)


def test_a_run_stops_where_it_is_told_to():
    data = two_classes(6)
    network = DuTwoLayer(64, 400, symmetric=True)
    track = train(network, data.inputs, data.targets, eta=0.3, steps=1000, every=7, stop_below=0.5)
    norm = float(data.targets.norm())
    assert track.residuals[-1] <= 0.5 * norm < track.residuals[-2]
    assert track.at[0] == 0
    assert track.at[-1] == len(track.residuals) - 1
    assert track.drift[0] == 0
    with torch.no_grad():
        network.hidden.weight.copy_(track.weight)
        outputs = network(data.inputs)
    assert float((outputs - data.targets).norm()) == pytest.approx(track.residuals[-1], rel=1e-9)


def test_du_end_to_end(tmp_path):
    words = ["--n", "3", "--width", "64", "--draws", "6", "--depths", "[2,3]"]
    assert main(["lab", "du", *words, "--out", str(tmp_path)]) == 0
    _, stored = page(tmp_path, "du")
    rows = stored["tables"]["Each network"]
    assert [(row["network"], row["H"]) for row in rows] == [
        (n, h) for n in ("FC", "ResNet", "ConvResNet") for h in (2, 3)
    ]
    assert all(row["order"] >= 32 for row in rows)


def test_a_wrong_kernel_fails_the_check_of_du():
    """The check can fail: with a limit that is off by a few standard errors it says so."""
    cases = [du._case(name, 2, two_classes(4).inputs, 128, 16, 0.5, 0) for name in du.DEFINITIONS]
    assert all(check.holds for check in du._checks(cases, 8.0) if check.must)
    moved = cases[0].limit.matrix + 9 * cases[0].standard_errors
    wrong = du.Case(
        "FC", 2, du.LimitKernel(moved, cases[0].limit.covariances, 0.0, 0, 1.0), cases[0].printed, cases[0].draws
    )
    assert not du._checks([wrong, *cases[1:]], 8.0)[0].holds


def test_depth_end_to_end(tmp_path):
    words = ["--depth", "--n", "4", "--width", "48", "--depths", "[2,4,8]"]
    assert main(["lab", "du", *words, "--out", str(tmp_path)]) == 0
    text, stored = page(tmp_path, "du-depth")
    assert len(stored["tables"]["Each network"]) == 18
    assert "lab du --depth --n 4" in text


def test_an_unresolved_lambda_0_is_an_upper_bound_on_the_page():
    x = two_classes(6).inputs
    deep = du_depth._measure("FC", "softplus", 32, x, 16, 0.5, 0)
    assert not deep.resolved
    assert du_depth._row(deep)["lambda_0"].startswith("<= ")
    assert du_depth._row(deep)["cost"].startswith(">= ")
    shallow = du_depth._measure("FC", "softplus", 2, x, 16, 0.5, 0)
    assert float(du_depth._row(shallow)["lambda_0"]) == pytest.approx(shallow.limit.lambda_0.value, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["du2layer", "--widths", "[64]"], "widths: [64]"),
        (["du2layer", "--draws", "1"], "draws, steps: 1"),
        (["random-labels", "--n", "7"], "n: 7"),
        (["random-labels", "--steps", "0"], "steps: 0"),
        (["du", "--depths", "[3,2]"], "depths: [3, 2]"),
        (["du", "--draws", "2"], "draws: 2"),
    ],
)
def test_mistakes_get_one_message(capsys, words, message):
    assert main(["lab", *words]) == 2
    assert message in capsys.readouterr().err


def test_steps_to_a_share_are_the_first_at_or_below():
    fit = random_labels.Fit(torch.ones(4), None, None, None, 0.0, 0.0)
    assert fit.steps_to(0.5, [2.0, 1.5, 1.0, 0.5]) == 2
    assert fit.steps_to(0.1, [2.0, 1.5]) is None
