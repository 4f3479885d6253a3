"""A run of a recipe is named for what it is, with the next free number."""

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.recipes import WideFC
from lightning_conv.recipes.run_names import kind_of_run, named_logger, next_name


def test_a_run_with_a_guard_is_guarded_wherever_the_guard_is():
    assert kind_of_run(WideFC(), []) == "guarded"
    assert kind_of_run(WideFC(guard=False), []) == "plain"
    assert kind_of_run(WideFC(guard=False), [ExpressivityGuard()]) == "guarded"
    assert kind_of_run(LightningModule(), []) == "plain"


def test_the_number_is_greater_than_those_of_its_kind(tmp_path):
    assert next_name(tmp_path / "none", "plain") == "plain_0"
    for name in ("plain_0", "plain_12", "guarded_3", "version_99", "plain_x"):
        (tmp_path / name).mkdir()
    assert next_name(tmp_path, "plain") == "plain_13"
    assert next_name(tmp_path, "guarded") == "guarded_4"


def test_the_settings_of_the_logger_stay(tmp_path):
    settings = {"save_dir": str(tmp_path), "name": "net", "default_hp_metric": False, "version": None}
    made = named_logger(TensorBoardLogger(**settings), settings, "plain")
    assert made.log_dir == str(tmp_path / "net" / "plain_0")
    assert made._default_hp_metric is False


@pytest.mark.parametrize("logger", [None, True, CSVLogger])
def test_other_loggers_and_given_versions_are_left_alone(tmp_path, logger):
    settings = {"save_dir": str(tmp_path), "name": "net", "version": None}
    given = logger(str(tmp_path)) if isinstance(logger, type) else logger
    assert named_logger(given, settings, "plain") is None
    settings["version"] = "mine"
    assert named_logger(TensorBoardLogger(**settings), settings, "plain") is None
