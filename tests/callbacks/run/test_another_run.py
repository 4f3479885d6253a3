"""What a monitor keeps from one run to the next: everything in a resumed one, nothing in another one."""

from __future__ import annotations

import io

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_conv import KernelGram, ntk_gram
from lightning_conv.callbacks import KernelStability, LambdaMin
from lightning_conv.callbacks.run.measured_kernel import gram_from_state, gram_state


class Crash(pl.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.at:
            raise RuntimeError("crashed")


def monitors():
    return [KernelStability(every_n_steps=1, probe=10), LambdaMin(every_n_steps=1, probe=10)]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_monitor_whose_run_crashed_forgets_it_in_the_next(make_trainer, make_module, make_loader, at, swapped):
    used, fresh = monitors(), monitors()
    with pytest.raises(RuntimeError, match="crashed"):
        make_trainer([*used, Crash(at)], max_epochs=2).fit(make_module(), make_loader())
    data = make_loader(torch.utils.data.Subset(make_loader().dataset, range(40, 96)))  # other samples, too
    used = used[::-1] if swapped else used
    for callbacks in (used, fresh):
        make_trainer(callbacks, max_epochs=1, limit_train_batches=2).fit(make_module(seed=3, width=50), data)
    stability = used[-1 if swapped else 0]
    assert stability._reference_step == 0
    assert stability.drift == fresh[0].drift
    states = [
        next(c.state_dict()["inputs"] for c in cs if c.state_dict()["inputs"] is not None) for cs in (used, fresh)
    ]
    assert torch.equal(*states)


def test_a_monitor_that_crashed_before_its_first_measurement_starts_anew(
    monkeypatch, make_trainer, make_module, make_loader
):
    monitor = KernelStability(every_n_steps=1, probe=10)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_conv.callbacks.run.probe_kernel.resolved_spectrum", lambda *a, **k: 1 / 0)
        with pytest.raises(MisconfigurationException, match="division by zero"):
            make_trainer([monitor], max_epochs=1).fit(make_module(), make_loader())
    data = make_loader(torch.utils.data.Subset(make_loader().dataset, range(40, 96)))
    make_trainer([monitor], max_epochs=1).fit(make_module(seed=3), data)
    rows = {tuple(row.tolist()) for row in data.dataset.dataset.tensors[0][40:]}
    assert {tuple(row.tolist()) for row in monitor.state_dict()["inputs"]} <= rows


def test_a_further_fit_of_the_same_trainer_goes_on(make_trainer, make_module, make_loader):
    monitor, module = KernelStability(every_n_steps=1, probe=10), make_module()
    trainer = make_trainer([monitor], max_epochs=1)
    trainer.fit(module, make_loader())
    reference = monitor._reference[0].matrix
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader())
    assert trainer.global_step == 6
    assert torch.equal(monitor._reference[0].matrix, reference)
    assert monitor._last_step == 6


def test_a_run_resumed_from_its_start_keeps_its_reference(tmp_path, make_trainer, make_module, make_loader):
    class Save(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "start.ckpt")

    trainer = make_trainer([KernelStability(every_n_steps=1, probe=10), Save()], max_epochs=1)
    trainer.fit(make_module(), make_loader())
    resumed = KernelStability(every_n_steps=1, probe=10)
    make_trainer([resumed], max_epochs=1).fit(make_module(seed=9), make_loader(), ckpt_path=tmp_path / "start.ckpt")
    assert torch.equal(resumed._reference[0].matrix, trainer.callbacks[0]._reference[0].matrix)


def test_a_checkpoint_that_knows_nothing_of_the_monitor_begins_a_new_run_for_it(
    tmp_path, make_trainer, make_module, make_loader
):
    make_trainer([], max_epochs=1, checkpoint=True).fit(make_module(seed=3), make_loader())
    used = KernelStability(every_n_steps=1, probe=10)
    make_trainer([used], max_epochs=1, limit_train_batches=2).fit(make_module(), make_loader())
    make_trainer([used], max_epochs=2).fit(
        make_module(seed=3), make_loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    assert used._reference_step == 3


def test_a_kernel_survives_a_checkpoint_as_plain_types():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    gram = ntk_gram(model, torch.randn(5, 3), per_layer=True)
    file = io.BytesIO()
    torch.save(gram_state(gram), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    back = gram_from_state(state)
    assert isinstance(back, KernelGram)
    assert torch.equal(back.matrix, gram.matrix)
    assert back.layer_traces == gram.layer_traces
    assert (back.plan, dict(back.layer_matrices)) == (None, {})
    for name in ("outputs", "floor", "jacobian_error", "parameters", "precision", "projection_error", "n_outputs"):
        assert getattr(back, name) == getattr(gram, name), name


def test_kernels_of_older_and_newer_checkpoints_load():
    gram = ntk_gram(torch.nn.Linear(3, 1), torch.randn(5, 3))
    state = gram_state(gram)
    older = {name: value for name, value in state.items() if name not in ("layer_traces", "projection_error")}
    assert torch.equal(gram_from_state(older).matrix, gram.matrix)
    assert gram_from_state(older).layer_traces == {}
    assert torch.equal(gram_from_state(state | {"of_a_later_version": 1}).matrix, gram.matrix)


def test_monitors_resume_from_a_checkpoint_without_the_newer_keys(tmp_path, make_trainer, make_module, make_loader):
    make_trainer(monitors(), max_epochs=1, checkpoint=True).fit(make_module(), make_loader())
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        for key in ("targets", "step_size"):
            state.pop(key, None)
        for key in ("layer_traces", "projection_error"):
            state.get("reference", {}).pop(key, None)
    torch.save(checkpoint, path)
    resumed = monitors()
    trainer = make_trainer(resumed, max_epochs=2)
    trainer.fit(make_module(seed=5), make_loader(), ckpt_path=path)
    assert trainer.global_step == 6
    assert resumed[0]._reference_step == 0
    assert resumed[0].drift.relative_frobenius > 0
