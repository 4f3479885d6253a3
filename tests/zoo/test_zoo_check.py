"""``check_run`` says of a module what its run then says, and leaves the run as it is to the last bit."""

import random
import tempfile
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from cases import CASES
from run_state import differences, run_state
from zoo_judge import Losses, fit

from lightning_conv.callbacks import ConvergenceDiagnostics, ExpressivityGuard, Probe, check_run
from lightning_conv.callbacks.monitors.base import KernelMonitor
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.run.assumptions import violated

NAMED = {case.name: case for case in CASES}

FAST = ("dict_batch", "named_tuple_batch", "batch_norm", "gan", "lazy", "iterable", "autoencoder", "accumulated")
SLOW = (
    "squeezed",
    "vae",
    "alternating",
    "combined_loader",
    "gru",
    "scripted_trunk",
    "hidden_state",
    "swa",
    "bf16_mixed",
    "backbone_unfrozen",
)
MEASURED = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def begun(case, callbacks=(), **options):
    """Return a module, its data and a trainer, from the seed of the zoo."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    own = {"logger": False, "max_epochs": 2, "accelerator": "cpu", "devices": 1}
    trainer = pl.Trainer(**(quiet | own | dict(case.options) | options), callbacks=[*case.callbacks(), *callbacks])
    return case.module(), case.data(), trainer


class FirstMeasurement(pl.Callback):
    """Keeps what the monitors before it say of their first measurement, in a real run."""

    def __init__(self):
        self.said = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._keep(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._keep(trainer)

    def _keep(self, trainer):
        monitors = monitors_of(trainer, KernelMonitor)
        if self.said or any(each.last_step is None and not each.measured for each in monitors):
            return
        for each in monitors_of(trainer, KernelMonitor):
            if each.kernel is not None:
                self.said.setdefault(each.optimizer, {})[type(each).__name__] = each, each.measured, facts(each.kernel)
        self.theorems = {
            name: {paper: violated(each.violations, tracker.assumes) for paper, tracker in each.trackers.items()}
            for name, found in self.said.items()
            for each in [found["ConvergenceCriteria"][0]]
        }


def facts(kernel):
    return kernel.samples, kernel.numbers, kernel.probe.outputs, kernel.n_outputs, kernel.weights


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", MEASURED)
def test_what_is_checked_is_what_the_run_measures(name, tmp_path):
    case = NAMED[name]
    # Which samples a budget allows for depends on how busy the machine is; that they are named leaves nothing to it.
    given = [ConvergenceDiagnostics(Probe(size=12, outputs="trace"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, data, trainer = begun(case, given)
        found = check_run(trainer, module, data)
        seen = FirstMeasurement()
        module, data, trainer = begun(case, [*given, seen], max_epochs=1, default_root_dir=tmp_path)
        trainer.fit(module, data)
    assert seen.said, "nothing was measured in the run"
    assert {each.optimizer for each in found.networks} == set(seen.said)
    for network in found.networks:
        said = seen.said[network.optimizer]
        assert set(network.callbacks) == set(said)
        _, words, of_run = said["KernelStability"]
        numbers = None if of_run[1] is None else tuple(of_run[1])
        assert (network.samples, network.numbers, network.outputs, network.n_outputs, network.weights) == (
            of_run[0],
            numbers,
            *of_run[2:],
        )
        assert network.call in words
        assert f"({network.call_source})" in words
        assert network.loss in words
        for theorem in network.theorems:
            of_run_reasons = seen.theorems[network.optimizer][theorem.paper]
            assert set(of_run_reasons.split("; ") if of_run_reasons else ()) <= set(theorem.reasons), theorem.paper


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    "name",
    ["dict_batch", "batch_norm", "gan", "lazy", *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW[:5])],
)
def test_a_run_after_a_check_is_the_run_without_it_to_the_last_bit(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = NAMED[name]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        plain = fit(case)
        losses = Losses()
        module, data, trainer = begun(case, [losses], default_root_dir=folder)
        check_run(trainer, module, data)
        trainer.fit(module, data)
        assert differences(plain.state, run_state(trainer, data, losses.seen)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", ["net_in_step", "trunk_and_head", "dict_batch", "squeezed"])
def test_the_head_is_the_one_that_the_guard_takes(name):
    case = NAMED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, data, trainer = begun(case)
        head = check_run(trainer, module, data).head
        guard = ExpressivityGuard(on_undecided="continue")
        module, data, trainer = begun(case, [guard], max_epochs=1)
        trainer.fit(module, data)
    assert head.name == guard.head_name
    assert head.features == dict(module.named_modules())[head.name].in_features
    assert head.rows == 12
    assert not head.asked


@pytest.mark.usefixtures("lenient")
def test_what_cannot_be_measured_is_said_with_the_line_to_write():
    refused = next(case for case in CASES if case.expected == "needs one argument" and case.name == "forward_by_name")
    module, data, trainer = begun(refused)
    found = check_run(trainer, module, data)
    if not found.refused:  # a later version may do without
        assert found.ok
        return
    assert not found.ok
    assert "forward_fn" in found.refused[0]
