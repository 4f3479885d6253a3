"""The arguments of the guard: their order, their help, and a configuration file that sets them."""

from __future__ import annotations

import inspect
import math
import pickle

import numpy as np
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_conv.callbacks import ExpressivityGuard

ORDER = [
    "switch_at",
    "head",
    "noise_scale",
    "on_undecided",
    "seed",
    "loss_fn",
    "infimum",
    "input_fn",
    "target_fn",
    "forward_fn",
    "method",
    "step_rule",
    "cache_features",
    "plateau_threshold",
    "plateau_patience",
    "plateau_window",
    "latest_switch",
    "tol",
    "track_rank",
]


def test_the_positional_order_of_the_arguments_stays():
    assert list(inspect.signature(ExpressivityGuard).parameters) == ORDER
    guard = ExpressivityGuard(0.5, "head", 1e-2, "raise", 3)
    assert (guard.switch_at, guard.head, guard.noise_scale, guard.on_undecided, guard.seed) == (
        0.5,
        "head",
        1e-2,
        "raise",
        3,
    )


def test_every_argument_is_documented_where_help_shows_it():
    documented = inspect.getdoc(ExpressivityGuard).split("Args:")[1].split("Raises:")[0]
    names = [line.strip().split(":")[0] for line in documented.splitlines() if line[:4] == "    " and line[4:5].strip()]
    assert sorted(names) == sorted(ORDER)


def test_a_configuration_sets_the_arguments(capsys):
    def guards(**arguments):
        given = {"class_path": "lightning_conv.callbacks.ExpressivityGuard", "init_args": arguments}
        options = {"logger": False, "accelerator": "cpu", "enable_checkpointing": False, "callbacks": [given]}
        trainer = LightningCLI(BoringModel, run=False, args={"trainer": options}).trainer
        return [callback for callback in trainer.callbacks if isinstance(callback, ExpressivityGuard)]

    arguments = {"switch_at": "auto", "plateau_patience": 2, "step_rule": "certified"}
    (guard,) = guards(**arguments)
    assert {name: getattr(guard.settings, name) for name in arguments} == arguments
    with pytest.raises(SystemExit):
        guards(step_rule="unknown")
    assert "step_rule" in capsys.readouterr().err


def test_settings_do_not_change_and_guards_are_told_apart():
    guard = ExpressivityGuard()
    with pytest.raises(AttributeError, match="seed"):
        guard.seed = 1
    assert guard != ExpressivityGuard()
    assert pickle.loads(pickle.dumps(guard)).seed == guard.seed


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "switch_at": [np.array([1, 2]), "later", -1, 1.5, True],
        "noise_scale": ["1e-3", 0.0, True, None],
        "tol": ["x", -1.0],
        "plateau_threshold": [None],
        "plateau_patience": [1.5, 0, "3"],
        "plateau_window": [0, 2.5, "x"],
        "latest_switch": ["x", 1.0],
        "seed": ["x", None, 1.5, 2**70],
        "loss_fn": ["mse", nn.MSELoss],
        "infimum": ["x", math.inf],
        "input_fn": ["x"],
        "target_fn": [3],
        "forward_fn": [nn.Linear],
        "cache_features": ["no", 1],
        "track_rank": [None],
        "method": ["x"],
        "step_rule": [3],
        "on_undecided": [None],
    }.items(),
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_wrong_value_is_refused_with_the_name_of_its_argument(name, values):
    for value in values:
        with pytest.raises(MisconfigurationException, match=rf"^{name}: .*; need "):
            ExpressivityGuard(**{name: value})


def test_numbers_of_numpy_are_numbers():
    guard = ExpressivityGuard(switch_at=np.int64(3), tol=np.float64(1e-5), seed=np.int64(2))
    assert (guard.switch_at, guard.tol, guard.seed) == (3, 1e-5, 2)
