"""The judge sees what it is there to see: each test breaks one thing and names the outcome."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo_judge
from case import Reading
from cases import CASES
from lightning.fabric.utilities.exceptions import MisconfigurationException
from oracle import trace_kernel
from run_state import differences
from torch import nn

from lightning_conv.callbacks import ConvergenceDiagnostics

NAMED = {case.name: case for case in CASES}


@pytest.fixture
def diagnostics_that(monkeypatch):
    """Put something in the place of the one line that does more than it should, when the training ends or in another hook."""

    def put(more, hook="on_train_end"):
        class Diagnostics(ConvergenceDiagnostics):
            pass

        setattr(Diagnostics, hook, lambda self, trainer, pl_module: more(pl_module))
        monkeypatch.setattr(zoo_judge, "ConvergenceDiagnostics", Diagnostics)
        return zoo_judge.judge(NAMED["dict_batch"])

    return put


def scale_a_weight(module):
    module.net[0].weight.data.mul_(1 + 1e-6)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (lambda module: torch.rand(1), "generator.torch"),
        (lambda module: random.random(), "generator.python"),
        (lambda module: np.random.rand(), "generator.numpy"),
        (scale_a_weight, "weight net.0.weight"),
        (lambda module: setattr(module, "mark", 1), "attribute .mark"),
        (lambda module: module.net.register_forward_hook(lambda *_: None), "hooks of net"),
        (lambda module: module.net[2].eval(), "mode of net.2"),
        (lambda module: torch.backends.mha.set_fastpath_enabled(False), "setting.fast path"),
    ],
)
def test_what_a_measurement_changes_is_named(diagnostics_that, more, name):
    outcome = diagnostics_that(more)
    torch.backends.mha.set_fastpath_enabled(True)
    assert outcome.kind == "changed"
    assert name in outcome.sentence


def fails(error):
    def more(_):
        raise error

    return more


def test_a_misconfiguration_before_the_first_step_is_a_refusal_and_any_other_error_a_crash(diagnostics_that):
    assert diagnostics_that(fails(MisconfigurationException("not so")), "on_train_start").kind == "refused"
    assert diagnostics_that(fails(RuntimeError("lost")), "on_train_start").kind == "crashed"
    assert diagnostics_that(fails(MisconfigurationException("not so"))).kind == "crashed"


def test_advice_that_does_not_help_stays_a_refusal(diagnostics_that):
    outcome = diagnostics_that(fails(MisconfigurationException("pass forward_fn=...")), "on_train_start")
    assert outcome.kind == "refused"
    assert "followed" in outcome.sentence


def test_another_network_is_wrong():
    case = NAMED["dict_batch"]
    other = replace(case, readings=(Reading(lambda m, b: m.net[0](b["x"])),))
    assert zoo_judge.judge(other).kind == "wrong"


def test_two_plain_runs_are_equal_to_the_last_bit():
    case = NAMED["lstm"]
    assert differences(zoo_judge.fit(case).state, zoo_judge.fit(case).state) == []
    assert "loss[0].loss" in differences(zoo_judge.fit(case).state, zoo_judge.fit(NAMED["gru"]).state)


def test_the_oracle_agrees_with_the_formula_of_a_linear_layer():
    x = torch.randn(5, 4)
    kernel = trace_kernel(nn.Linear(4, 3), Reading(lambda m, b: m(b)), x)
    torch.testing.assert_close(kernel, 3 * (x.double() @ x.double().T + 1))
    of_bias = trace_kernel(nn.Linear(4, 3), Reading(lambda m, b: m(b), "bias"), x)
    torch.testing.assert_close(of_bias, torch.full((5, 5), 3.0, dtype=torch.float64))


def test_the_oracle_holds_the_statistics_of_the_batch():
    x = torch.randn(6, 2) * 3 + 1
    norm = nn.BatchNorm1d(2)
    kernel = trace_kernel(norm, Reading(lambda m, b: m(b)), x)
    normed = (x.double() - x.double().mean(0)) / (x.double().var(0, unbiased=False) + norm.eps).sqrt()
    right = 2 + normed @ normed.T
    torch.testing.assert_close(kernel, right)
    assert torch.equal(norm.running_mean, torch.zeros(2))
