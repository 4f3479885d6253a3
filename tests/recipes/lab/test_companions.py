"""The laboratories of clipping, averaged SGD and threshold networks, end to end in tiny settings, and what they do not take."""

from __future__ import annotations

import json

import pytest

from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab import EXPERIMENTS, experiment, resolve

TINY = {
    "gclip": ["--n", "6", "--width", "32", "--steps", "60", "--sweep", "2"],
    "averaged-sgd": ["--n", "60", "--width", "16", "--widths", "[16,64]", "--runs", "2", "--last", "30"],
    "threshold": ["--n", "6", "--decay", "[0.1]", "--widths", "[4]", "--runs", "2", "--steps", "50"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_it_runs_and_writes_its_page_and_nothing_that_must_hold_is_violated(tmp_path, name):
    assert main(["lab", name, *TINY[name], "--out", str(tmp_path)]) == 0
    slug, _ = resolve(name)
    stored = json.loads((tmp_path / f"{slug}.json").read_text())
    assert all(check["holds"] for check in stored["checks"] if check["must"])
    assert len(stored["checks"]) >= 5
    page = (tmp_path / f"{slug}.md").read_text()
    assert f"![{page.splitlines()[0][2:]}]({slug}.png)" in page
    assert (tmp_path / f"{slug}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gclip", {"threshold": 0.5, "delta": 0.2}, "threshold, delta: 0.5, 0.2"),
        ("gclip", {"steps": 0}, "steps, sweep: 0"),
        ("averaged-sgd", {"runs": 1}, "runs: 1"),
        ("averaged-sgd", {"noise": 0.6}, "noise: 0.6"),
        ("averaged-sgd", {"n": 5000}, "n: 5000"),
        ("threshold", {"runs": 0}, "runs, steps, decay, widths: 0"),
    ],
)  # fmt: skip
def test_impossible_settings_get_one_message(name, settings, message):
    assert resolve(name)[0] in EXPERIMENTS
    with pytest.raises(ValueError, match=message):
        experiment(name)(**settings)


def test_the_clipped_runs_of_the_laboratory_are_those_of_the_formula():
    """The wide network's descent, written out with torch.optim, ends at the same loss."""
    import torch
    from torch import nn

    from lightning_conv.recipes.lab.clipping.experiment import Problem, descend

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    inputs, targets = torch.randn(5, 4).double(), torch.randn(5).double()
    path = descend(Problem(network, inputs, targets), 0.1, 0.05, 0.3, 15)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for t in range(15):
        optimizer.zero_grad()
        loss = ((network(inputs)[:, 0] - targets) ** 2).mean() / 2
        assert float(loss.detach()) == pytest.approx(path.losses[t], rel=1e-12)
        loss.backward()
        norm = float(torch.cat([p.grad.flatten() for p in network.parameters()]).norm())
        for parameter in network.parameters():
            parameter.grad *= min(1.0, max(0.3, 0.05 / norm))
        optimizer.step()


def test_averaged_sgd_follows_its_linearisation_more_closely_the_wider_the_network():
    report = experiment("averaged-sgd")(n=80, width=32, widths=(32, 2048), runs=2, last=30)
    gaps = report.data["gaps"]
    assert gaps[2048] < gaps[32] / 2
