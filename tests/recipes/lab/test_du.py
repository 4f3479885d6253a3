"""The laboratory's experiments on Du et al., end to end in tiny settings; their pages say what was seen."""

import json
import math

import numpy as np
import pytest
import torch

from lightning_conv import h_infinity, residual_limit
from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.du import depth as du_depth
from lightning_conv.recipes.lab.du import limit as du
from lightning_conv.recipes.lab.du import limit_findings
from lightning_conv.recipes.lab.du import printed as du_printed
from lightning_conv.recipes.lab.du import two_layer as du2layer
from lightning_conv.recipes.lab.du.architectures import SOFTPLUS
from lightning_conv.recipes.lab.du.depth_findings import row as depth_row
from lightning_conv.recipes.lab.du.depth_laws import depth_law
from lightning_conv.recipes.lab.du.two_layer_run import Track, train
from lightning_conv.recipes.lab.random_labels.findings import FACTOR, Fit
from lightning_conv.theory import DuTwoLayer


def page(folder, name):
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return (folder / f"{name}.md").read_text(), json.loads((folder / f"{name}.json").read_text())


def test_du2layer_end_to_end(tmp_path):
    """The page's claims hold in a small setting, and are what its numbers say."""
    words = ["--n", "10", "--widths", "[128,512,2048,8192]", "--draws", "16", "--steps", "120"]
    assert main(["lab", "du2layer", *words, "--out", str(tmp_path)]) == 0
    text, stored = page(tmp_path, "du_two_layer")
    held = {check["claim"]: check["holds"] for check in stored["checks"]}
    for claim in (
        "|H(0) - H_inf|_2 falls like m^(-1/2)",
        "lambda_min(H(k)) >= lambda_0 / 2 along training",
        "|u(k) - y|^2 <=",
    ):
        assert [holds for found, holds in held.items() if found.startswith(claim)] == [True]
    gaps = {int(m): values for m, values in stored["data"]["gaps"].items()}
    assert {m: len(values) for m, values in gaps.items()} == dict.fromkeys((128, 512, 2048, 8192), 16)
    points = [(math.log(m), math.log(gap)) for m, values in gaps.items() for gap in values]
    assert np.polyfit(*zip(*points, strict=True), 1)[0] == pytest.approx(-0.5, abs=0.1)
    widest = stored["data"]["largest width"]
    assert min(widest["lambda_min"]) >= stored["data"]["lambda_0"][2] / 2
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
    text, _ = page(tmp_path, "du_two_layer")
    assert "| **NO** | \\|u(k) - y\\|^2 <=" in text


def test_random_labels_end_to_end(tmp_path):
    words = ["--n", "10", "--tests", "20", "--width", "4096", "--steps", "600"]
    assert main(["lab", "random-labels", *words, "--out", str(tmp_path)]) == 0
    _, stored = page(tmp_path, "random_labels")
    for name in ("true", "random"):
        data = stored["data"][name]
        assert data["wrong"][-1] == 0
        assert data["residuals"][0] == pytest.approx(math.sqrt(10), rel=1e-9)  # u(0) = 0
        assert sum(data["shares"]) == pytest.approx(1.0)
    assert {row["labels"] for row in stored["tables"]["Both label vectors"]} == {"true", "random"}


def test_a_prediction_that_is_off_by_more_than_its_factor_is_told():
    """The tolerance is on the number of steps: a curve 1.6 times as slow stays within 0.1 |y| and fails all the same."""
    k = torch.arange(200, dtype=torch.float64)
    labels = torch.ones(4, dtype=torch.float64)
    fits = {}
    for name, pace in (("good", 1.2), ("slow", 1.6)):
        track = Track(2, residuals=(2 * 0.97 ** (k / pace)).tolist(), wrong=[0] * 200)
        fits[name] = Fit(labels, track, 2 * 0.97**k, None, 0.0, 0.0)
    assert fits["good"].factor == pytest.approx(1.2, abs=0.03)
    assert fits["good"].factor <= FACTOR < fits["slow"].factor == pytest.approx(1.6, abs=0.03)
    late = Fit(labels, Track(2, residuals=[2.0, 1.9, 1.8]), torch.tensor([2.0, 0.9, 0.1]), None, 0.0, 0.0)
    assert late.paces() == {0.5: (None, 1), 0.2: (None, 2), 0.1: (None, 2)}
    assert late.factor == 3.0  # at least: nothing was reached within three measurements


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


@pytest.mark.slow
def test_du_end_to_end(tmp_path):
    words = ["--n", "3", "--width", "64", "--draws", "6", "--depths", "[2,3]"]
    assert main(["lab", "du", *words, "--out", str(tmp_path)]) == 0
    _, stored = page(tmp_path, "du")
    rows = stored["tables"]["Each network"]
    assert [(row["network"], row["H"]) for row in rows] == [
        (n, h) for n in ("FC", "ResNet", "ConvResNet") for h in (2, 3)
    ]
    assert all(row["order"] >= 32 for row in rows)
    compared = [(row["network"], row["H"], row["printed"]) for row in stored["tables"]["What is printed"]]
    assert ("ResNet", 3, "covariance") in compared
    assert not any(network == "ResNet" and depth == 2 for network, depth, _ in compared)  # it is FC's there


def test_a_wrong_kernel_fails_the_check_of_du():
    """The check can fail: with a limit that is off by a few standard errors it says so."""
    cases = [du._case(name, 2, two_classes(4).inputs, 128, 16, 0.5, 0) for name in limit_findings.DEFINITIONS]
    assert all(check.holds for check in limit_findings.checks_of(cases, 8.0) if check.must)
    moved = cases[0].limit.matrix + 9 * cases[0].standard_errors
    wrong = limit_findings.Case(
        "FC", 2, LimitKernel(moved, cases[0].limit.covariances, 0.0, 0, 1.0), cases[0].scale, cases[0].draws
    )
    assert not limit_findings.checks_of([wrong, *cases[1:]], 8.0)[0].holds


@pytest.mark.slow
def test_depth_end_to_end(tmp_path):
    words = ["--depth", "--n", "4", "--width", "48", "--depths", "[2,4,8]"]
    assert main(["lab", "du", *words, "--out", str(tmp_path)]) == 0
    text, stored = page(tmp_path, "du_depth")
    assert len(stored["tables"]["Each network"]) == 18
    laws = stored["tables"]["Exponential or power law, fitted to all depths"]
    soft = next(law for law in laws if (law["network"], law["sigma"], law["quantity"]) == ("FC", "softplus", "cost"))
    assert soft["fits"] == "exponential"
    assert "lab du --depth --n 4" in text


@pytest.mark.parametrize(
    ("law", "better"),
    [(lambda h: 3 * 1.2**h, "exponential"), (lambda h: 2 * h**1.5, "power"), (lambda h: 1 + 0.01 * h, "flat"),
     (lambda h: h**1.0 * 1.08**h, "nearer power"), (lambda h: h**0.9 * 1.1**h, "nearer exponential")],
)  # fmt: skip
def test_a_law_of_depth_is_named_only_where_the_depths_tell_it(law, better):
    """Against both fits by numpy; two points fit any law."""
    depths = [2, 4, 8, 16, 32]
    found = depth_law(depths, [law(h) for h in depths])
    assert found.better == better
    logs = np.log([law(h) for h in depths])
    for x, slope, residual in (
        (depths, found.rate, found.exponential_residual), (np.log(depths), found.exponent, found.power_residual)
    ):  # fmt: skip
        fit = np.polyfit(x, logs, 1)
        assert slope == pytest.approx(fit[0])
        assert residual == pytest.approx(np.sqrt(np.mean((np.polyval(fit, x) - logs) ** 2)), abs=1e-12)
    assert depth_law([2, 32], [1.0, 50.0]).better == "not told"


@pytest.mark.slow
def test_the_printed_kernels_of_the_residual_network_are_refuted_by_narrow_networks():
    """Networks narrow enough for a test tell both of Definition 6.1's kernels from those that networks tend to."""
    covariance, pairing = du_printed.residual_rivals(
        du._random_directions(6, 0), (2, 3), 192, 512, SOFTPLUS, 0, lambda share: None
    )
    for rivals in (covariance, pairing):
        assert [rival.depth for rival in rivals] == [3]
        assert du_printed.check("printed", "Definition 6.1", rivals).holds


def test_for_equal_norms_the_printed_pairing_is_no_difference():
    x = du._random_directions(4, 0)
    limit = residual_limit(x, 4, SOFTPLUS, c_res=0.9)
    assert torch.allclose(du_printed.paired_as_printed(x, limit, 4, SOFTPLUS, 0.9), limit.matrix, rtol=1e-9)


def test_an_unresolved_lambda_0_is_an_upper_bound_on_the_page():
    x = two_classes(6).inputs
    deep = du_depth._measure("FC", "softplus", 32, x, 16, 0.5, 0)
    assert not deep.resolved
    assert depth_row(deep)["lambda_0"].startswith("<= ")
    assert depth_row(deep)["cost"].startswith(">= ")
    shallow = du_depth._measure("FC", "softplus", 2, x, 16, 0.5, 0)
    assert float(depth_row(shallow)["lambda_0"]) == pytest.approx(shallow.limit.lambda_0.value, rel=1e-3)


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
    fit = Fit(torch.ones(4), None, None, None, 0.0, 0.0)
    assert fit.steps_to(0.5, [2.0, 1.5, 1.0, 0.5]) == 2
    assert fit.steps_to(0.1, [2.0, 1.5]) is None
