"""The experiments on Allen-Zhu et al. and the companions, end to end in tiny settings; what must hold is checked by their own checks."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab import resolve
from lightning_conv.recipes.lab.allen_zhu import experiment as allen_zhu
from lightning_conv.recipes.lab.allen_zhu import findings as allen_zhu_findings
from lightning_conv.recipes.lab.bias_ntk import experiment as bias_ntk
from lightning_conv.recipes.lab.frei import experiment as frei
from lightning_conv.recipes.lab.linear_networks import experiment as linear_networks
from lightning_conv.recipes.lab.linear_regions import experiment as linear_regions
from lightning_conv.theory.papers.linear_regions import LinearRegions

NAMES = ["allen-zhu", "bias-ntk", "frei", "linear-networks", "linear-regions"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_writes_its_page_and_nothing_that_must_hold_is_violated(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CONV_SMALL", "1")
    assert main(["lab", name, "--out", str(tmp_path)]) == 0
    slug, _ = resolve(name)
    page = (tmp_path / f"{slug}.md").read_text()
    assert "**NO**" not in page
    assert f"]({slug}.png)" in page
    assert (tmp_path / f"{slug}.png").stat().st_size > 10_000
    stored = json.loads((tmp_path / f"{slug}.json").read_text())
    assert len(stored["checks"]) >= 5
    assert stored["data"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["allen-zhu", "--widths", "[16]"], "need two widths or more"),
        (["bias-ntk", "--thresholds", "[0.0,-1.0]"], "need two or more B >= 0"),
        (["frei", "--steps", "1"], "steps: 1"),
        (["linear-networks", "--depth", "1"], "need depth 2 or more"),
        (["linear-regions", "--width", "0"], "need positive numbers"),
    ],
)
def test_settings_that_make_no_sense_get_one_message(words, message, capsys):
    assert main(["lab", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "violated", "told"),
    [
        (lambda r, p: {"relative_spectral": 1e-3 * r.width}, allen_zhu_findings.SPECTRAL, None),
        (lambda r, p: {"relative_frobenius": 1e-3 * r.width}, allen_zhu_findings.FROBENIUS, None),
        (lambda r, p: {"changed": 1e-3 * r.width}, allen_zhu_findings.SWITCHED, None),
        (lambda r, p: {"drift": p.drift * r.width}, None, "|h_(i,l) - h_(i,l)(0)| <= C"),
    ],
    ids=["spectral distance", "Frobenius distance", "switched units", "drift"],
)
def test_what_allen_zhu_has_fall_with_the_width_is_violated_where_it_rises(changes, violated, told, monkeypatch):
    """Real runs with one quantity exchanged for one that grows with the width."""
    trained = allen_zhu._train

    def exchanged(*arguments):
        run = trained(*arguments)
        return replace(run, probes=[replace(p, **changes(run, p)) if p.step else p for p in run.probes])

    monkeypatch.setattr(allen_zhu, "_train", exchanged)
    report = allen_zhu.run(n=8, depth=2, widths=(16, 64), seeds=2, max_steps=60, probes=6)
    if violated:
        assert any(check.claim.startswith(violated) for check in report.violated)
    if told:
        assert [check.holds for check in report.checks if check.claim.startswith(told)] == [False]


def test_a_semi_smooth_fit_that_does_not_reach_held_out_steps_is_a_violation(monkeypatch):
    fitted = allen_zhu.fit_semi_smoothness
    monkeypatch.setattr(
        allen_zhu, "fit_semi_smoothness", lambda steps: replace(f := fitted(steps), a=f.a / 9, b=f.b / 9)
    )
    report = allen_zhu.run(n=8, depth=2, widths=(16, 64), seeds=2, max_steps=60, probes=6)
    assert any("held-out steps" in check.claim for check in report.violated)


def test_allen_zhu_trains_by_plain_gradient_descent():
    """The recorded loss after one step is that of a step of autograd's gradient."""
    x, y = torch.eye(4, 6, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    net = allen_zhu.AllenZhuNet(6, 12, 2, 1, seed=5)
    twin = allen_zhu.AllenZhuNet(6, 12, 2, 1, seed=5)
    run = allen_zhu._train(net, x, y, 5, 1e-9, 1, 2)
    loss = (twin(x) - y).square().sum() / 2
    trained = [p for p in twin.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, g in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p -= run.eta * g
        after = (twin(x) - y).square().sum() / 2
    assert [p.step for p in run.probes] == [0, 1]
    assert run.probes[0].ratios.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert run.probes[1].ratios.loss == pytest.approx(float(after), rel=1e-10)
    assert run.probes[0].omega == 0


def test_bias_ntk_begins_with_the_same_errors_and_counts_its_steps():
    report = bias_ntk.run(n=10, width=128, thresholds=(0.0, 1.0), stop_at=0.5, max_steps=200)
    losses = [r["losses"] for r in report.data["runs"]]
    assert [found[0] for found in losses] == [pytest.approx(5.0)] * 2
    assert all(found[-1] <= 2.5 < found[-2] for found in losses)


def test_whitened_images_are_orthonormal_and_images_are_not():
    images = torch.rand(30, 64, dtype=torch.float64)
    sets = {data.name: data for data in frei.data_sets(images, 10, 300, 0)}
    white = sets["whitened"].train
    assert torch.allclose(white @ white.T, torch.eye(10, dtype=torch.float64), atol=1e-10)
    assert sets["whitened"].orthogonality.criteria(0.5)[1].verdict == "certified"
    assert sets["images"].orthogonality.criteria(0.5)[1].verdict == "refuted"
    assert len(sets["images"].test) == 20


def test_gradients_of_a_product_are_autograds():
    target = torch.randn(3, 5, dtype=torch.float64)
    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (6, 4), (3, 6))]
    loss = (weights[2] @ weights[1] @ weights[0] - target).square().sum() / 2
    exact = torch.autograd.grad(loss, weights)
    found = linear_networks.gradients_for(target)([w.detach() for w in weights])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, exact, strict=True))


def test_a_missed_kink_would_be_seen():
    net = linear_regions.sawtooth(3)
    found = linear_regions.linear_regions(net)
    assert linear_regions.off_the_line(net, found) < 1e-14
    kinks = tuple(kink for kink in found.kinks if not math.isclose(kink, 0.375))
    missing = LinearRegions(found.activation, kinks, found.widths, found.arithmetic)
    assert linear_regions.off_the_line(net, missing) > 0.1
