"""Allen-Zhu et al. in a run: norms of hidden states at the start, the constants of the lemmas, the exponent of switched units."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria
from lightning_conv.callbacks.criteria.papers.allen_zhu import states as forward_stability
from lightning_conv.callbacks.criteria.papers.allen_zhu.states import ForwardStability
from lightning_conv.theory.networks import AllenZhuNet
from lightning_conv.theory.papers.allen_zhu import gradient_ratios, unit_inputs
from lightning_conv.theory.tools.observation import Observation


@pytest.fixture
def data() -> TensorDataset:
    torch.manual_seed(5)
    return TensorDataset(unit_inputs(torch.randn(8, 5)), torch.randn(8, 2, dtype=torch.float64))


def run(make_trainer, make_regression, data, network, *, epochs=8, lr=0.002, **options):
    criteria = ConvergenceCriteria("allen_zhu", every_n_steps=1)
    trainer = make_trainer([criteria], max_epochs=epochs, logger=options.pop("logger", False), **options)
    trainer.fit(make_regression(network, lr=lr).double(), DataLoader(data, batch_size=len(data)))
    return {each.name: each for each in criteria.criteria}, criteria


def test_on_the_papers_network_every_number_is_that_of_the_definition(make_trainer, make_regression, data, recorder):
    network = AllenZhuNet(6, 300, 2, 2)
    start = copy.deepcopy(network)
    found, criteria = run(make_trainer, make_regression, data, network, logger=recorder)
    inputs, targets = data.tensors
    norms = torch.stack([h.norm(dim=1) for h in start.states(inputs)])
    for name, value in (("hidden_norm_min", norms.min()), ("hidden_norm_max", norms.max())):
        assert recorder.scalars[f"theory/{name}"] == {0: pytest.approx(float(value))}
        assert found[name].measured == pytest.approx(float(value))
        assert found[name].verdict == "consistent"  # at a width of 300

    omega = max(
        float(torch.linalg.matrix_norm(w - w_0, 2)) for w, w_0 in zip(network.weights, start.weights, strict=True)
    )
    drift = max(
        float((h - h_0).norm(dim=1).max()) for h, h_0 in zip(network.states(inputs), start.states(inputs), strict=True)
    )
    expected = {"drift_constant": drift / (omega * 2**2.5 * math.sqrt(math.log(300)))}
    # Theorem 3 on F, by the closed form of the gradient; the run's loss is F / 8.
    ratios = gradient_ratios(network.objective(inputs, targets))
    delta = float(torch.pdist(inputs).min())  # of unit_inputs, which are taken as they are
    expected |= {
        "gradient_lower_constant": ratios.over_largest * 2 * 8 / (delta * 300),
        "gradient_upper_constant": ratios.over_sum * 2 / (2 * 8 * 300),
        "pl_ratio": ratios.over_sum / 8,
        "gradient_over_largest": ratios.over_largest / 8,
    }
    for name, value in expected.items():
        assert recorder.scalars[f"theory/{name}"][8] == pytest.approx(value, rel=1e-6), name
    assert 0 not in recorder.scalars["theory/drift_constant"]  # nothing has moved
    omegas = [recorder.scalars["theory/layer_distance_spectral"][t] for t in range(1, 9)]
    shares = [recorder.scalars["theory/sign_changes"][t] for t in range(1, 9)]
    slope = float(np.polyfit(np.log(omegas), np.log(shares), 1)[0])
    assert found["sign_change_exponent"].measured == pytest.approx(slope)
    assert found["sign_change_exponent"].verdict == "consistent"
    assert "fitted to 8 measurements" in found["sign_change_exponent"].reason
    assert [each.assumption for each in criteria.violations] == ["smooth"]  # which this theorem does not ask for


def test_a_narrow_network_is_refuted_and_other_settings_are_told_and_not_judged(make_trainer, make_regression, data):
    def judged(network, samples=data):
        return run(make_trainer, make_regression, samples, network, epochs=2)[0]

    narrow = judged(AllenZhuNet(6, 3, 2, 2))
    assert "refuted" in {narrow["hidden_norm_min"].verdict, narrow["hidden_norm_max"].verdict}
    trained = AllenZhuNet(6, 40, 2, 2)
    trained.last.requires_grad_(True)
    longer = TensorDataset(2 * data.tensors[0], data.tensors[1])
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)).double()
    with torch.no_grad():
        norms = plain[:2](data.tensors[0]).norm(dim=1)
    for said, found in (
        ("W_1..W_L, all of them and nothing else", judged(trained)),
        ("inputs of norm 1", judged(AllenZhuNet(6, 40, 2, 2), longer)),
        ("trains another network", judged(plain)),
    ):
        for name in ("hidden_norm_min", "hidden_norm_max", "sign_change_exponent"):
            assert found[name].verdict == "not applicable"
            assert said in found[name].reason
        assert found["hidden_norm_min"].measured > 0
    assert found["hidden_norm_min"].measured == pytest.approx(float(norms.min()))
    assert found["hidden_norm_max"].measured == pytest.approx(float(norms.max()))


def followed(pairs) -> ForwardStability:
    """Of the paper's network, with these omegas and shares of switched units."""
    stability = ForwardStability()
    stability.begin(AllenZhuNet(4, 10, 1, 1), unit_inputs(torch.randn(3, 3)), ["hidden.0.weight"])
    for step, (omega, share) in enumerate(pairs):
        raw = {"layer_distance_spectral": omega, "sign_changes": share, "forward_drift": omega}
        stability.measure(raw, Observation(step, 1.0, 1.0, omega))
    return stability


@pytest.mark.parametrize(
    ("exponent", "verdict", "said"),
    [
        (1.0, "consistent", "with omega from 0.01 to 0.16"),
        (2 / 3, "consistent", "is at least 0.6167"),
        (0.4, "undecided", "refutes no bound whose constant is unspecified"),
    ],
)
def test_the_exponent_is_judged_from_below(exponent, verdict, said):
    stability = followed([(0.01 * 2**t, 0.3 * (0.01 * 2**t) ** exponent) for t in range(5)])
    found = stability.criteria(from_the_start=True)[-1]
    assert found.verdict == verdict
    assert found.measured == pytest.approx(exponent)
    assert said in found.reason
    late = stability.criteria(from_the_start=False)[-1]
    assert late.verdict == "not applicable"
    assert "from its first step" in late.reason


def test_of_another_network_the_norms_are_told_and_no_points_are_gathered(monkeypatch):
    stability = ForwardStability()
    stability.begin(nn.Linear(4, 1), unit_inputs(torch.randn(3, 3)), ["weight", "bias"])
    for step in range(1, 9):
        raw = {
            "layer_distance_spectral": 0.01 * step,
            "sign_changes": 0.1 * step,
            "hidden_norm_min": 0.9,
            "hidden_norm_max": 1.1,
        }
        assert stability.measure(raw, Observation(step, 1.0, 1.0, 0.1)) == {}
    assert stability.state_dict()["points"] == []
    stability.load_state_dict(
        {"norms": [0.9, 1.1], "points": [[t, 0.01 * 2**t, 0.1] for t in range(5)]}
    )  # of an older version

    def fitted(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(forward_stability, "sign_change_exponent", fitted)
    least, greatest, exponent = stability.criteria(from_the_start=True)
    assert (least.measured, greatest.measured) == (0.9, 1.1)
    assert math.isnan(exponent.measured)
    assert {each.verdict for each in (least, greatest, exponent)} == {"not applicable"}
    assert "trains another network" in exponent.reason


def test_a_scattered_fit_a_short_path_and_few_points_decide_nothing():
    scattered = followed([(0.01 * 2**t, 0.3 * (0.01 * 2**t) ** 0.8 * 3 ** (-1) ** t) for t in range(5)])
    few = followed([(0.0, 0.0), (0.01, 0.1), (0.02, 0.2), (0.03, 0.3)])
    short = followed([(0.01 + 0.001 * t, 0.1 + 0.01 * t) for t in range(9)])
    none = followed([])
    for said, stability in (
        ("lies between", scattered),
        ("3 different omega", few),
        ("1.8 times the smallest", short),
        ("0 different omega", none),
    ):
        found = stability.criteria(from_the_start=True)[-1]
        assert found.verdict == "undecided"
        assert said in found.reason


def test_what_was_followed_goes_through_a_checkpoint_and_a_step_counts_once():
    stability = followed([(0.01 * 2**t, 0.01 * 2**t) for t in range(5)])
    stability.measure({"layer_distance_spectral": 0.16, "sign_changes": 0.16}, Observation(4, 1.0, 1.0, 0.1))
    other = followed([])
    other.load_state_dict(stability.state_dict())
    assert [repr(c) for c in other.criteria(from_the_start=True)] == [
        repr(c) for c in stability.criteria(from_the_start=True)
    ]
    assert "fitted to 5 measurements" in other.criteria(from_the_start=True)[-1].reason
