"""A paper is added by one registered file: it is chosen, judged, logged, reported and resumed as the others are."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria, ConvergenceReport
from lightning_conv.callbacks.criteria import CriteriaTracker, register_criteria, registered_criteria, tracker

PAGE = (Path(__file__).parents[3] / "docs" / "how_to" / "own_paper.md").read_text(encoding="utf-8")
ON_THE_PAGE = re.search(r"```python\n(.*?@register_criteria.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """Leave the registry as it was."""
    monkeypatch.setattr(tracker, "_REGISTRY", dict(tracker._REGISTRY))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file of the page, written and imported as a user would."""
    assert ON_THE_PAGE is not None
    path = tmp_path / "slow_descent.py"
    path.write_text(ON_THE_PAGE.group(1))
    spec = importlib.util.spec_from_file_location("slow_descent", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "slow_descent", module)
    spec.loader.exec_module(module)
    return module.SlowDescent


@pytest.fixture
def fit(make_trainer, make_regression):
    torch.manual_seed(2)
    data = TensorDataset(torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64))

    def run(criteria, epochs=4, ckpt_path=None, momentum=0.0, callbacks=(), **options):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        module = make_regression(network, lr=0.05, momentum=momentum).double()
        trainer = make_trainer([criteria, *callbacks], max_epochs=epochs, **options)
        trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=ckpt_path)
        return trainer

    return run


def judged(criteria):
    return next(each for each in criteria.criteria if each.name == "slow_descent")


@pytest.mark.slow
def test_it_is_judged_with_the_others_or_alone(own, fit):
    together = ConvergenceCriteria(every_n_steps=1)
    fit(together)
    assert judged(together).verdict == "consistent"
    assert judged(together).measured == max(seen.contraction for seen in together.history[:-1])
    assert list(together.trackers)[-1] == "slow_descent"  # behind the papers that come with the library
    for which in ("slow_descent", own, own(slowest=1.0), ["du", own]):
        alone = ConvergenceCriteria(which, every_n_steps=1)
        fit(alone)
        assert judged(alone).verdict == "consistent"
        assert set(alone.trackers) - {"du"} == {"slow_descent"}
    strict = ConvergenceCriteria(own(slowest=0.01), every_n_steps=1)
    fit(strict)
    assert judged(strict).verdict == "refuted"
    assert strict.metrics["theory/refuted"] == 1


def test_a_violated_assumption_is_named(own, fit):
    criteria = ConvergenceCriteria("slow_descent", every_n_steps=1)
    fit(criteria, momentum=0.9)
    assert judged(criteria).verdict == "not applicable"
    assert "momentum=0.9" in judged(criteria).reason
    assert [each.assumption for each in criteria.violations] == ["descent"]


def test_its_scalars_reach_the_loggers_callback_metrics_and_the_report(own, fit, tmp_path, recorder):
    criteria, report = ConvergenceCriteria("slow_descent", every_n_steps=1), ConvergenceReport(folder=str(tmp_path))
    trainer = fit(criteria, callbacks=[report], logger=[recorder, CSVLogger(tmp_path)])
    slowest = max(seen.contraction for seen in criteria.history[:-1])
    assert recorder.scalars["theory/slowest_contraction"][3] == slowest
    assert float(trainer.callback_metrics["theory/slowest_contraction"]) == pytest.approx(slowest)
    assert set(recorder.scalars["theory/learning_rate"]) == {0}  # it is among ``once``
    assert recorder.scalars["theory/learning_rate"][0] == 0.05
    stored = json.loads((tmp_path / "convergence.json").read_text())
    assert [(each["name"], each["verdict"]) for each in stored["criteria"]] == [("slow_descent", "consistent")]
    assert "theory/slowest_contraction" in stored["metrics"]
    assert "A. Author 2026" in (tmp_path / "convergence.md").read_text()


def test_a_resumed_run_remembers_its_state(own, fit, tmp_path):
    straight = ConvergenceCriteria("slow_descent", every_n_steps=1)
    fit(straight, epochs=6)
    fit(ConvergenceCriteria("slow_descent", every_n_steps=1), epochs=3, checkpoint=True)
    resumed = ConvergenceCriteria("slow_descent", every_n_steps=1)
    fit(resumed, epochs=6, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert repr(judged(resumed)) == repr(judged(straight))
    assert resumed.trackers["slow_descent"].state_dict() == straight.trackers["slow_descent"].state_dict()
    # A checkpoint from before the paper was added has no state of it, and it begins anew.
    fit(ConvergenceCriteria("du", every_n_steps=1), epochs=3, checkpoint=True)
    later = ConvergenceCriteria("slow_descent", every_n_steps=1)
    fit(later, epochs=6, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert judged(later).verdict == "consistent"


def test_an_error_in_it_keeps_no_other_paper_from_being_judged(own, fit, monkeypatch, lenient):
    monkeypatch.setattr(own, "observe", lambda self, run, step: 1 / 0)
    criteria = ConvergenceCriteria(every_n_steps=1)
    with pytest.warns(UserWarning, match="slow_descent: the step after a measurement is left out at step 1: division"):
        fit(criteria)
    assert {"descent_efficiency", "step_contraction"} <= {each.name for each in criteria.criteria}


def test_every_run_begins_with_an_empty_state(own, fit):
    criteria = ConvergenceCriteria(own(slowest=0.9), every_n_steps=1)
    fit(criteria)
    first = criteria.trackers["slow_descent"]
    fit(criteria, epochs=2)
    assert criteria.trackers["slow_descent"] is not first
    assert criteria.trackers["slow_descent"].limit == 0.9
    assert len(criteria.history) == 3


def test_former_names_are_accepted():
    criteria = ConvergenceCriteria(["oymak_soltanolkotabi", "implicit_bias", "frei"])
    assert list(criteria.trackers) == ["oymak", "frei"]
    assert set(registered_criteria()) == {
        "allen_zhu", "bias_ntk", "chatterjee", "clipping", "du", "frei", "kawaguchi_sun", "oymak",
    }  # fmt: skip


def test_an_option_goes_to_the_papers_that_have_it():
    assert ConvergenceCriteria(radius=2.0).trackers["chatterjee"].radius == 2.0
    assert list(ConvergenceCriteria("du", radius=2.0).trackers) == ["du"]
    with pytest.raises(MisconfigurationException, match="radius: -1"):
        ConvergenceCriteria(radius=-1)


def test_what_is_missing_or_taken_is_said():
    body = {"criteria": lambda self, run: []}
    complete = {"name": "other", "source": "B. Author 2026", "assumes": frozenset({"descent"})} | body

    def registered(**changes):
        attributes = {name: value for name, value in (complete | changes).items() if value is not None}
        return register_criteria(type("Other", (CriteriaTracker,), attributes))

    for changes, said in (
        ({"name": None}, "Other: the class variable 'name' is missing"),
        ({"source": None}, "the class variable 'source' is missing"),
        ({"assumes": None}, "the class variable 'assumes' is missing"),
        ({"assumes": frozenset({"no noise"})}, "assumes has 'no noise', which is not one of descent, "),
        ({"needs": frozenset({"hessian"})}, "needs has 'hessian', which is not one of layers, activity, step norms"),
        ({"needs": ["layers"]}, r"needs is \['layers'\]; need a frozenset"),
        ({"assumes": "descent"}, "assumes is 'descent'; need a frozenset"),
        ({"name": "auto"}, "name is 'auto'; need the paper's short name"),
        ({"name": 3}, "name is 3; need"),
        ({"aliases": "old"}, "aliases is 'old'; need a tuple"),
        ({"criteria": None}, "the method 'criteria' is missing"),
        ({"name": "du"}, r"Other: the name 'du' is taken by .*papers\.du\.tracker\.DuTracker"),
        ({"aliases": ("implicit_bias",)}, r"the name 'implicit_bias' is taken by .*FreiTracker"),
    ):
        with pytest.raises(TypeError, match=said):
            registered(**changes)
    for no_class in (object(), int, "du"):
        with pytest.raises(TypeError, match="is not a class derived from CriteriaTracker"):
            register_criteria(no_class)
    assert registered() is registered_criteria()["other"]
    assert registered(source="as in a notebook that is run again") is registered_criteria()["other"]


ERRORS = {
    "state_dict": (lambda self: 1 / 0, "its state is not in the checkpoint: division"),
    "figures": (lambda self: 1 / 0, "its figures are left out: division"),
    "no figures": (lambda self: None, "its figures are left out: 'NoneType'"),
    "before_step": (lambda self, run, rate: 1 / 0, "steps are not noted: division"),
    "finish": (lambda self, run: 1 / 0, "the end of the fit is left out at step 4: division"),
    "criteria": (lambda self, run: [1], "nothing is judged at step 0: criteria: 1; need a list of Criterion"),
    "measure": (lambda self, run, gram, spectrum: {"x": None}, "left out at step 0: 'x': None; need a number"),
    "observe": (lambda self, run, step: {"x": torch.ones(3)}, "left out at step 1: 'x': tensor"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_no_error_and_no_odd_result_of_a_tracker_ends_the_run(own, fit, monkeypatch, lenient, name):
    replaced, said = ERRORS[name]
    monkeypatch.setattr(own, name.removeprefix("no "), replaced)
    criteria = ConvergenceCriteria(["kawaguchi_sun", own], every_n_steps=1)
    with pytest.warns(UserWarning, match=re.escape("ConvergenceCriteria, slow_descent: ") + ".*" + re.escape(said)):
        trainer = fit(criteria)
    assert trainer.global_step == 4
    assert "expressivity_condition" in {each.name for each in criteria.criteria}


def test_a_tracker_that_cannot_read_its_state_begins_anew(own, fit, monkeypatch, tmp_path, lenient):
    first = ConvergenceCriteria(own, every_n_steps=1)
    fit(first).save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.setattr(own, "load_state_dict", lambda self, state: state["in another format"])
    later = ConvergenceCriteria(own, every_n_steps=1)
    with pytest.warns(UserWarning, match="slow_descent: it begins anew, without its state in the checkpoint"):
        fit(later, epochs=6, ckpt_path=tmp_path / "last.ckpt")
    assert judged(later).verdict == "consistent"


def test_every_tracker_is_asked_at_the_end_of_the_fit(own, fit, monkeypatch):
    asked = []
    other = type("Other", (own,), {"name": "other"})
    for each in (own, other):
        monkeypatch.setattr(each, "finish", lambda self, run: asked.append(self.name) or True, raising=False)
    fit(ConvergenceCriteria([own, other], every_n_steps=1))
    assert asked == ["slow_descent", "other"]


def test_what_is_no_tracker_is_refused_by_its_value(own):
    for which in (None, [3], {"du"}, int, CriteriaTracker):
        with pytest.raises((MisconfigurationException, TypeError), match=r"is not known; choose from|is missing; see"):
            ConvergenceCriteria(which)
    with pytest.raises(MisconfigurationException, match="two trackers of the name 'slow_descent'"):
        ConvergenceCriteria([own(slowest=0.5), own(slowest=0.1)])
