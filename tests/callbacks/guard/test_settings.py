"""The arguments of the guard: their order, their help, and a configuration file that sets them."""

from __future__ import annotations

import inspect
import pickle

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

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
