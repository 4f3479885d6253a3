"""What the recipe promises as a whole: diagnostics that change nothing, a kill that costs nothing, a dashboard that is filled."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_conv.callbacks import LambdaMin
from lightning_conv.recipes import DigitsDataModule, WideFC
from lightning_conv.recipes.cli import main

EPOCHS = 5  # of 6 batches; the guard switches after step 18, at the end of the third
RUN = [
    *("fit", "--config", "wide_fc", "--data.test_fraction", "0.8", "--trainer.max_epochs", str(EPOCHS)),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_model_summary", "false", "--model.measure_every", "4"),
]


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.values.append(float(outputs["loss"]))


@pytest.mark.parametrize("guard", [False, True])
def test_a_run_with_both_monitors_ends_bit_for_bit_like_one_without(quiet_trainer, guard):
    def run(diagnostics):
        seed_everything(0, verbose=False)
        losses = Losses()
        module = WideFC(diagnostics=diagnostics, measure_every=3, guard=guard)
        # In place of the recipe's own: with everything that it can measure.
        own = [LambdaMin(probe=32, every_n_steps=3, per_layer="spectra")] if diagnostics else []
        trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=[losses, *own])
        trainer.fit(module, DigitsDataModule(test_fraction=0.8))
        return module, losses.values, torch.get_rng_state(), trainer

    plain, watched = run(False), run(True)
    assert "kernel/lambda_min" not in plain[3].callback_metrics
    assert {"kernel/lambda_min_layers", "kernel/alignment"} <= set(watched[3].callback_metrics)
    assert plain[1] == watched[1]
    assert torch.equal(plain[2], watched[2])
    for (name, a), b in zip(plain[0].state_dict().items(), watched[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def scalars(folder, after):
    """All scalars of the event files in ``folder`` at steps above ``after``: {tag: [(step, value), ...]}."""
    found = {}
    for file in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag) if e.step > after)
    return found


def changes(points):
    """Return the ends of the stretches of equal values; none if all are equal."""
    if not points:
        return []
    ends = [each for each, after in zip(points, [*points[1:], (None, None)], strict=True) if each[1] != after[1]]
    return ends if len(ends) > 1 else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run of the recipe from the first step to the last."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        assert main(RUN) == 0
    return folder / "runs" / "wide_fc" / "guarded_0"


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "killed_at"), [(1, 8), (2, 26)])
def test_a_killed_run_resumes_to_the_numbers_of_the_uninterrupted_one(
    tmp_path, monkeypatch, uninterrupted, phase, killed_at
):
    (tmp_path / "killed").mkdir()
    # A process of its own that is killed with a signal it cannot catch, in the middle of an epoch.
    code = f"""
import os, signal
from lightning.pytorch import Trainer
from lightning_conv.recipes.cli import main
import lightning.pytorch.loops.training_epoch_loop as loop
advance = loop._TrainingEpochLoop.advance
def lethal(self, *args):
    advance(self, *args)
    if self.global_step == {killed_at}:
        os.kill(os.getpid(), signal.SIGKILL)
loop._TrainingEpochLoop.advance = lethal
main({RUN!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "killed", capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    monkeypatch.chdir(tmp_path / "killed")
    first = tmp_path / "killed" / "runs" / "wide_fc" / "guarded_0" / "checkpoints" / "last.ckpt"
    state = torch.load(first, weights_only=True)
    assert next(s["phase"] for key, s in state["callbacks"].items() if "ExpressivityGuard" in key) == phase
    assert main([*RUN, "--ckpt_path", str(first)]) == 0

    resumed_from = state["global_step"]
    assert resumed_from == killed_at // 6 * 6
    again = tmp_path / "killed" / "runs" / "wide_fc" / "guarded_1"
    whole = scalars(uninterrupted, resumed_from)
    resumed = scalars(again, resumed_from)
    assert {"train_loss", "val_acc", "guard/gap", "kernel/lambda_min", "kernel/alignment"} <= {
        t for t in whole if whole[t]
    }
    # What has not changed since the resumption is held back.
    assert {tag for tag in resumed if changes(resumed[tag])} == {tag for tag in whole if changes(whole[tag])}
    for tag in resumed:
        of_whole = changes(whole.get(tag, []))
        assert not of_whole or changes(resumed[tag]) == of_whole, tag
    last = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (uninterrupted, again)]
    for name, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][name]), name


def test_the_event_file_of_the_recipe_holds_every_group_of_the_dashboard(uninterrupted):
    events = EventAccumulator(str(uninterrupted))
    events.Reload()
    tags = events.Tags()
    for group in ("convergence/", "kernel/", "guard/"):
        assert any(tag.startswith(group) for tag in tags["scalars"]), group
    assert "hp_metric" not in tags["scalars"]
    assert "kernel/log10_eigenvalues" in tags["histograms"]
    assert {"kernel/spectrum", "kernel/spectrum_against_start", "kernel/per_layer"} <= set(tags["images"])
    texts = {f"{name}/text_summary" for name in ("guard/reason", "kernel/layers", "kernel/step_size")}
    assert {"custom_scalars__config__", *texts} <= set(tags["tensors"])


@pytest.mark.slow
def test_the_loss_on_the_training_set_falls_in_every_phase_two_epoch(quiet_trainer):
    seed_everything(0, verbose=False)
    trainer: Trainer = quiet_trainer(max_epochs=10)
    module = WideFC(diagnostics=False)
    trainer.fit(module, DigitsDataModule(test_fraction=0.8))
    (guard,) = [callback for callback in trainer.callbacks if type(callback).__name__ == "ExpressivityGuard"]
    assert guard.certificate.verdict == "certified"
    assert guard.certificate.rank_lower == guard.certificate.n == 359
    losses = [entry["loss"] for entry in guard.history]
    assert len(losses) == 5
    assert all(later < earlier for earlier, later in pairwise(losses))
