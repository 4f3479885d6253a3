"""A bad argument is named with its value and with what to pass instead."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_conv.arguments import (
    described,
    require_number,
    require_option,
    require_seed,
    require_truth,
    require_whole,
)
from lightning_conv.losses.per_sample import require_loss
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import input_tensors
from lightning_conv.networks.supported import require_module
from lightning_conv.reporting.progress import require_report


def said(error, function, *args, **options):
    with pytest.raises(error) as raised:
        function(*args, **options)
    return str(raised.value)


def test_a_value_is_shown_with_its_type_and_a_long_one_by_its_type_alone():
    assert described(torch.zeros(2, 3)) == "a tensor of shape (2, 3)"
    assert described(list(range(50))) == "an object of the type list"
    assert described(1.5) == "1.5 (float)"


def test_an_option_is_refused_with_those_that_there_are():
    require_option("outputs", "trace", ("trace", None))
    assert (
        said(ValueError, require_option, "outputs", "best", ("trace", None))
        == "outputs: 'best' is not one of 'trace', None"
    )


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ("a", TypeError, "step: 'a' (str); need a finite number of at least 0"),
        (None, TypeError, "step: None; need a finite number of at least 0"),
        (True, TypeError, "step: True (bool); need a finite number of at least 0"),
        (math.nan, ValueError, "step: nan; need a finite number of at least 0"),
        (math.inf, ValueError, "step: inf; need a finite number of at least 0"),
        (-1, ValueError, "step: -1; need a finite number of at least 0"),
    ],
)
def test_a_number_outside_its_interval_is_refused(value, error, says):
    assert said(error, require_number, "step", value, least=0.0) == says
    for good in (0, 0.5, np.float32(2), np.int64(3)):
        require_number("step", good, least=0.0)
    assert said(ValueError, require_number, "step", 0.0, above=0.0) == "step: 0.0; need a finite number above 0"
    require_number("step", math.inf, above=0.0, finite=False)
    assert said(ValueError, require_number, "step", math.nan, finite=False) == "step: nan; need a number"


def test_a_whole_number_and_a_truth_value_are_what_they_say():
    require_whole("count", np.int64(2), least=1)
    assert (
        said(TypeError, require_whole, "count", 1.0, least=1) == "count: 1.0 (float); need a whole number of at least 1"
    )
    assert said(ValueError, require_whole, "count", 0, least=1) == "count: 0; need a whole number of at least 1"
    require_truth("all", False)
    assert said(TypeError, require_truth, "all", "no") == "all: 'no' (str); need True or False"


def test_the_seeds_that_pass_are_those_that_torch_takes():
    for seed in (0, -1, np.int64(3), -(2**63), 2**64 - 1):
        require_seed(seed)
        torch.Generator().manual_seed(int(seed))
    assert said(TypeError, require_seed, "a") == "seed: 'a' (str); need a whole number, such as 0"
    assert said(TypeError, require_seed, 1.5) == "seed: 1.5 (float); need a whole number, such as 0"
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises((RuntimeError, ValueError, OverflowError)):
            torch.Generator().manual_seed(seed)
        assert "at most 64 bits" in said(ValueError, require_seed, seed)


def test_what_is_no_network_and_no_loss_is_refused():
    assert said(TypeError, require_module, None).startswith("model: None; need a torch.nn.Module")
    assert said(TypeError, require_module, nn.Tanh) == "model: the class Tanh; need an object of it, such as Tanh(...)"
    assert said(TypeError, require_loss, 3).startswith("loss_fn: 3 (int) cannot be called; need nn.CrossEntropyLoss()")
    assert (
        said(TypeError, require_loss, nn.MSELoss) == "loss_fn: the class MSELoss; need a loss of it, such as MSELoss()"
    )
    assert said(TypeError, require_report, "a").startswith("progress: 'a' (str); need True, False, None or a function")
    says = said(ValueError, StatelessModule, nn.Linear(1, 1), batch_norm="train")
    assert says == "batch_norm: 'train' is not one of 'eval', 'frozen', 'batch'"


@pytest.mark.parametrize(("inputs", "kind"), [(None, "NoneType"), (3.0, "float"), ("ab", "str"), ([1, 2], "int, int")])
def test_inputs_that_are_no_tensors_are_refused_with_their_types(inputs, kind):
    assert said(TypeError, input_tensors, inputs) == (
        f"inputs: expected a tensor, a tuple or a mapping of tensors, got {kind}; pass tensors only"
    )
