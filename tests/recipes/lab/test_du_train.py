"""The deep run of Du et al., tiny: plain gradient descent, the kernels' links measured, its page."""

import copy
import json

import pytest
import torch

from lightning_conv import fully_connected_limit, residual_limit
from lightning_conv.recipes.cli import main
from lightning_conv.recipes.lab.data import two_classes
from lightning_conv.recipes.lab.du.training_run import train
from lightning_conv.theory import DuFC, DuResNet


def jacobian(network, x):
    """Rows of gradients by autograd, one sample at a time; of all parameters, and of the last hidden layer's."""
    rows = []
    for sample in x:
        gradients = torch.autograd.grad(network(sample[None])[0], list(network.parameters()))
        rows.append(gradients)
    last = [name for name, _ in network.named_parameters()].index(f"hidden.{network.depth - 1}.weight")
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]), torch.stack(
        [row[last].flatten() for row in rows]
    )


@pytest.mark.parametrize("kind", [DuFC, DuResNet])
def test_the_run_is_gradient_descent_and_its_probes_are_those_of_autograd(kind):
    data = two_classes(6)
    x, y = data.inputs, data.targets
    network = kind(64, 48, 3, activation=torch.tanh, seed=1)
    twin = copy.deepcopy(network)
    limit = (fully_connected_limit if kind is DuFC else residual_limit)(x, 3, torch.tanh)
    run = train(network, x, y, limit, seed=1, steps=5, probes=4)
    lambda_0 = float(torch.linalg.eigvalsh(limit.matrix)[0])
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    whole, last = jacobian(twin, x)
    first = last @ last.T
    assert run.eta == pytest.approx(1 / float(torch.linalg.eigvalsh(whole @ whole.T)[-1]), rel=1e-9)
    assert run.start.measured == pytest.approx(
        float(torch.linalg.matrix_norm(first - limit.matrix, 2)) / lambda_0, rel=1e-6
    )
    probes = {probe.step: probe for probe in run.probes}
    assert set(probes) >= {0, 1, 5}
    for step in range(6):
        residual = twin(x).detach() - y
        assert run.losses[step] == pytest.approx(float(residual @ residual) / 2, rel=1e-9)
        whole, last = jacobian(twin, x)
        g, own = whole @ whole.T, last @ last.T
        gradient = whole.T @ residual
        vector = torch.nn.utils.parameters_to_vector(twin.parameters()).detach() - run.eta * gradient
        after = copy.deepcopy(twin)
        torch.nn.utils.vector_to_parameters(vector, after.parameters())
        if step in probes:
            probe = probes[step]
            assert probe.lambda_min.measured == pytest.approx(float(torch.linalg.eigvalsh(own)[0]) / lambda_0, rel=1e-6)
            assert probe.drift.measured == pytest.approx(
                float(torch.linalg.matrix_norm(own - first, 2)) / lambda_0, abs=1e-9
            )
            assert probe.whole.value == pytest.approx(float(torch.linalg.eigvalsh(g)[0]), rel=1e-6)
            left = after(x).detach() - twin(x).detach() + run.eta * g @ residual
            assert probe.remainder == pytest.approx(float(left.norm() / (run.eta * g @ residual).norm()), rel=1e-5)
            moved = max(float((p.detach() - start[name]).norm()) for name, p in twin.named_parameters()) / 48**0.5
            assert probe.movement == pytest.approx(moved, rel=1e-9)
        twin = after


@pytest.mark.slow
def test_du_train_end_to_end(tmp_path):
    words = ["--n", "6", "--widths", "[32,512]", "--seeds", "2", "--steps", "40", "--probes", "6"]
    assert main(["lab", "du-train", *words, "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "du_train.json").read_text())
    assert (tmp_path / "du_train.png").stat().st_size > 10_000
    claims = {check["claim"]: check for check in stored["checks"]}
    for name in ("DuFC", "DuResNet"):
        rate = next(
            check
            for claim, check in claims.items()
            if claim.startswith(f"{name}: |r(k)|^2 <= (1 - eta lambda_0 / 2)^k")
        )
        assert rate["must"]
        assert rate["holds"]
    assert [(run["network"], run["width"], run["seed"]) for run in stored["data"]["runs"]] == [
        (name, m, seed) for name in ("DuFC", "DuResNet") for m in (32, 512) for seed in (0, 1)
    ]
    assert all(len(run["losses"]) == 41 and run["losses"][-1] < run["losses"][0] for run in stored["data"]["runs"])


@pytest.mark.parametrize(
    ("words", "message"), [(["--widths", "[64]"], "widths: [64]"), (["--rate", "2.5"], "seeds: 1000, 24, 3, 2.5")]
)
def test_mistakes_get_one_message(capsys, words, message):
    assert main(["lab", "du-train", *words]) == 2
    assert message in capsys.readouterr().err
