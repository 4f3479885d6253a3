"""The certificates that the guard can be asked for: of the rank at these weights, at almost all, and of a narrow head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_conv.callbacks import ExpressivityGuard

SWITCH = 6


@pytest.fixture
def plain_run(make_trainer, make_module, make_loader):
    """A run without weight decay, so that nothing limits the argument."""

    def run(guard, data=None, loss_fn=None, width=120, **options):
        module = make_module(width=width)
        if width < 96:
            module.trunk[5] = nn.Tanh()  # better conditioned features
        module.loss_fn = loss_fn or module.loss_fn
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        make_trainer([guard], **options).fit(module, make_loader(data))
        return module

    return run


@pytest.mark.slow
def test_distinct_measures_the_closest_two_samples_as_they_enter_the_wide_layer(plain_run, data):
    guard = ExpressivityGuard(switch_at=SWITCH, method="distinct")
    module = plain_run(guard)
    assert guard.certificate.method == "distinct"
    assert guard.verdict == "certified"
    assert "is certified for almost every weight of the wide layer" in guard.reason
    with torch.no_grad():
        entering = module.double().eval().trunk[:3](data.tensors[0].double()).numpy()
    pairs = np.linalg.norm(entering[:, None] - entering[None], axis=2) + 1e9 * np.eye(96)
    assert guard.certificate.distance.value == pytest.approx(pairs.min(), rel=1e-6)
    assert guard.certificate.distance.lower <= pairs.min()


def test_distinct_is_not_claimed_of_a_layer_that_the_theorem_is_silent_about(make_trainer, make_module, make_loader):
    module, guard = make_module(), ExpressivityGuard(switch_at=SWITCH, method="distinct")
    module.trunk[5] = nn.ReLU()
    with pytest.warns(UserWarning, match=r'method="distinct" does not apply: .*use method="singular"'):
        make_trainer([guard]).fit(module, make_loader())
    assert (guard.phase, guard.verdict) == (1, "undecided")


@pytest.mark.slow
def test_a_narrow_head_is_trained_to_its_own_infimum_and_the_residual_is_reported(plain_run, data, one_hot_digits):
    guard = ExpressivityGuard(switch_at=SWITCH, method="alignment")
    module = plain_run(guard, one_hot_digits, nn.MSELoss(), width=20)
    assert guard.phase == 2
    assert guard.verdict == "refuted"
    assert "the last layer is trained to its own infimum" in guard.reason
    assert "provably does not reach them" in guard.reason
    with torch.no_grad():
        hidden = module.double().eval().trunk(data.tensors[0].double()).numpy()
    targets = one_hot_digits.tensors[1].double().numpy()
    columns = np.hstack([hidden, np.ones((96, 1))])
    rest = targets - columns @ np.linalg.lstsq(columns, targets, rcond=None)[0]
    assert guard.certificate.residual.value == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(targets), rel=1e-6)
    best = (rest**2).mean()
    assert guard.history[-1]["loss"] >= best
    assert guard.history[-1]["loss"] < guard.history[0]["loss"]


def test_a_narrow_head_that_reaches_the_targets_is_certified(plain_run, data):
    """Targets that are linear in what any trunk gives: constants, which the bias reaches."""
    constant = TensorDataset(data.tensors[0], torch.full((96, 10), 0.5))
    guard = ExpressivityGuard(switch_at=SWITCH, method="alignment")
    plain_run(guard, constant, nn.MSELoss(), width=20)
    assert guard.certificate.residual.upper < 1e-8
    assert (guard.phase, guard.verdict) == (2, "certified")
    assert "certified to reach the targets" in guard.reason


def test_a_narrow_head_that_goes_on_regardless_gets_its_residual_too(plain_run):
    guard = ExpressivityGuard(switch_at=SWITCH, on_undecided="continue")
    plain_run(guard, width=20)
    assert guard.phase == 2
    assert guard.certificate.method == "alignment"
    assert 0 < guard.certificate.residual.lower < 1
    assert "NOT certified" in guard.reason


@pytest.mark.slow
def test_certificates_of_every_method_survive_a_checkpoint(plain_run):
    for method in ("singular", "distinct", "alignment"):
        guard, other = ExpressivityGuard(switch_at=SWITCH, method=method), ExpressivityGuard()
        plain_run(guard)
        other.load_state_dict(guard.state_dict())
        assert other.certificate == guard.certificate
        assert other.verdict == guard.verdict == "certified", method
        assert other.history == guard.history
