"""Checkpoints of an earlier version load: the resumed run ends as an uninterrupted one of this version does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_conv.callbacks import ConvergenceCriteria
from lightning_conv.callbacks.run.upgrade import upgrade_state

FOLDER = Path(__file__).parents[1] / "checkpoints"
spec = importlib.util.spec_from_file_location("old_run", FOLDER / "old_run.py")
old_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(old_run)


@pytest.fixture(scope="module")
def straight():
    return {kind: old_run.run(kind) for kind in ("mlp", "du")}


def state_of(name):
    stored = torch.load(FOLDER / f"{name}.ckpt", weights_only=True)
    return stored["callbacks"]["ConvergenceCriteria"]


@pytest.mark.slow
@pytest.mark.parametrize("name", old_run.KEPT)
def test_the_resumed_run_ends_as_an_uninterrupted_one(name, straight):
    kind, _ = old_run.KEPT[name]
    (whole_trainer, whole), (trainer, resumed) = straight[kind], old_run.run(kind, ckpt_path=FOLDER / f"{name}.ckpt")
    assert trainer.global_step == whole_trainer.global_step == old_run.STEPS
    assert [seen.step for seen in resumed.history] == [seen.step for seen in whole.history] == list(range(9))
    for found, expected in zip(resumed.history, whole.history, strict=True):
        assert found.state() == pytest.approx(expected.state(), rel=1e-5, abs=1e-10, nan_ok=True), found.step
    # A guard of then did not say which samples it certified.
    unknown = {"phase_two_infimum"} if name == "phase_two" else set()
    assert [(each.name, each.verdict) for each in resumed.criteria] == [
        (each.name, "undecided" if each.name in unknown else each.verdict) for each in whole.criteria
    ]
    for found, expected in zip(resumed.criteria, whole.criteria, strict=True):
        same = pytest.approx((expected.measured, expected.bound), rel=1e-5, abs=1e-10, nan_ok=True)
        assert (found.measured, found.bound) == same, found.name
    assert set(resumed.metrics) == set(whole.metrics)
    assert set(trainer.callback_metrics) > {*resumed.metrics, "kernel/lambda_min", "convergence/kernel_change"}
    for tag, value in trainer.callback_metrics.items():
        expected = pytest.approx(float(whole_trainer.callback_metrics[tag]), rel=1e-4, abs=1e-9, nan_ok=True)
        assert float(value) == expected, tag


def test_the_state_is_carried_over_by_paper():
    old = state_of("du")
    new = upgrade_state(old)
    record = new["record"]
    assert set(record["trackers"]) == {"allen_zhu", "bias_ntk", "chatterjee", "du", "oymak"}
    evidence = record["trackers"]["du"]["evidence"]
    assert torch.equal(evidence["hidden_reference"], old["run"]["measured"]["hidden_reference"])
    assert evidence["at_start"]
    assert record["trackers"]["oymak"] == {
        name: old["run"]["measured"][name] for name in ("least_lambda", "greatest_lambda")
    }
    assert record["trackers"]["chatterjee"]["ball"] == old["run"]["start"]["ball"]
    assert record["observer"] == old["run"]["observer"]
    assert "run" in old  # it is left as it was
    assert upgrade_state(new) == new


def test_what_an_even_older_version_did_not_store_begins_anew():
    old = state_of("du")
    run = {name: value for name, value in old["run"].items() if name not in ("start", "sparse", "stability")}
    run["linearised"] = {"steps": {}}  # before the projection was stored
    criteria = ConvergenceCriteria(probe=5)
    criteria.load_state_dict(old | {"run": run})
    assert [seen.step for seen in criteria.history] == list(range(6))
    assert not criteria.trackers["du"].projection.follows
