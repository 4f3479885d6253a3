"""Yang et al. in a run: the share of active units against 1 - Phi(B), and lambda_min of the limit kernel H(B)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria
from lightning_conv.callbacks.criteria.papers.bias_ntk import BiasNTKTracker
from lightning_conv.theory.networks import BiasedTwoLayer


@pytest.fixture
def data() -> TensorDataset:
    torch.manual_seed(3)
    x = nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64))
    return TensorDataset(x, torch.randn(7, 1, dtype=torch.float64))


@pytest.fixture
def run(make_trainer, make_regression, data):
    def made(network, *, samples=data, epochs=4, lr=0.2, **options):
        criteria = ConvergenceCriteria("bias_ntk", every_n_steps=1)
        resumed = {"ckpt_path": path} if (path := options.pop("ckpt_path", None)) else {}
        trainer = make_trainer([criteria], max_epochs=epochs, **options)
        trainer.fit(make_regression(network, lr=lr).double(), DataLoader(samples, batch_size=len(samples)), **resumed)
        return {each.name: each for each in criteria.criteria}

    return made


def share_by_hand(network, x) -> float:
    return float((x @ network.hidden.weight.detach().T + network.hidden.bias.detach() > 0).double().mean())


def limit_by_hand(x: np.ndarray, threshold: float, bias: float) -> np.ndarray:
    """H(B) by the distribution function of two normal numbers."""
    n = len(x)
    kernel = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            rho = 1.0 if i == j else float(x[i] @ x[j])
            both = (
                norm.sf(threshold)
                if i == j
                else multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([-threshold, -threshold])
            )
            kernel[i, j] = (rho + bias) * both
    return kernel


@pytest.mark.parametrize("bias", [True, False])
def test_share_and_limit_kernel_are_those_of_the_definition(run, data, recorder, bias):
    network, x = BiasedTwoLayer(5, 3000, 1.0), data.tensors[0]
    network.hidden.bias.requires_grad_(bias)
    start, expected = share_by_hand(network, x), float(norm.sf(1.0))
    found = run(network, logger=recorder)
    assert recorder.scalars["theory/active_fraction_expected"] == {0: pytest.approx(expected)}
    smallest = np.linalg.eigvalsh(limit_by_hand(x.numpy(), 1.0, float(bias)))[0]
    assert recorder.scalars["theory/bias_ntk_lambda_min"] == {0: pytest.approx(smallest, rel=1e-4)}
    assert recorder.scalars["theory/active_fraction"][0] == pytest.approx(start)
    assert found["active_fraction_start"].measured == pytest.approx(abs(start - expected))
    assert found["active_fraction_start"].verdict == "consistent"
    largest = max(recorder.scalars["theory/active_fraction"].values())
    assert found["active_fraction"].measured == pytest.approx(largest)
    assert found["active_fraction"].bound == pytest.approx(math.exp(-0.5))
    assert found["active_fraction"].verdict == "consistent"
    assert "the worst, at step" in found["active_fraction"].reason


def test_biases_that_begin_elsewhere_are_refuted_and_an_order_is_not(run):
    network = BiasedTwoLayer(5, 3000, 1.0)
    with torch.no_grad():
        network.hidden.bias.fill_(0.8)  # all but a few are active
    found = run(network)
    assert found["active_fraction_start"].verdict == "refuted"
    assert found["active_fraction"].verdict == "undecided"
    assert "its constant unspecified" in found["active_fraction"].reason


def test_other_settings_are_told_and_not_judged(run, data, recorder):
    frozen = BiasedTwoLayer(5, 40, 1.0)
    frozen.hidden.weight.requires_grad_(False)
    longer = TensorDataset(3 * data.tensors[0], data.tensors[1])
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 1)).double()
    for said, found in (
        ("trains the hidden weights", run(frozen)),
        ("B = -1", run(BiasedTwoLayer(5, 40, -1.0))),
        ("inputs of norm 1", run(BiasedTwoLayer(5, 40, 1.0), samples=longer)),
        ("another network", run(plain, logger=recorder)),
    ):
        assert {each.verdict for each in found.values()} == {"not applicable"}
        assert all(said in each.reason for each in found.values())
        assert 0 < found["active_fraction"].measured < 1
    assert found["active_fraction"].measured == recorder.scalars["theory/active_fraction"][4]
    assert found["active_fraction_start"].measured == recorder.scalars["theory/active_fraction"][0]
    assert "theory/bias_ntk_lambda_min" not in recorder.scalars
    smooth = run(nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 1)).double())
    assert {each.verdict for each in smooth.values()} == {"not applicable"}


def test_a_resumed_run_remembers_its_start(run, tmp_path):
    whole = run(BiasedTwoLayer(5, 200, 0.5), epochs=4)
    run(BiasedTwoLayer(5, 200, 0.5), epochs=2, checkpoint=True)
    resumed = run(BiasedTwoLayer(5, 200, 0.5), epochs=4, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert repr(resumed) == repr(whole)
    late = BiasNTKTracker()
    view = SimpleNamespace(
        network=BiasedTwoLayer(5, 200, 0.5),
        inputs=nn.functional.normalize(torch.ones(3, 5)),
        measurement=SimpleNamespace(parameters=["hidden.weight"]),
        activity={"active_fraction": 0.3},
        step=5,
    )
    late.begin(view)
    late.measure(view, None, None)
    first = late.criteria(view)[0]
    assert first.verdict == "not applicable"
    assert "from its first step" in first.reason
