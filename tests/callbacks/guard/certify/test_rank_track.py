"""The rank at the start, before the noise, and after it: each against the singular values by hand, and nothing without being asked."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_conv.callbacks import ExpressivityGuard

SWITCH = 6


class Trunks(pl.Callback):
    """Copies of the network before the first step, and after the step of the switch, whose noise comes later."""

    def __init__(self):
        self.seen = {}

    def on_train_start(self, trainer, pl_module):
        self.seen["at_start"] = copy.deepcopy(pl_module.trunk)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == SWITCH:
            self.seen["before_noise"] = copy.deepcopy(pl_module.trunk)

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == SWITCH:
            self.seen["after"] = copy.deepcopy(pl_module.trunk)


def singular_values(trunk, inputs):
    with torch.no_grad():
        hidden = trunk.double().eval()(inputs.double()).numpy()
    return np.linalg.svd(np.hstack([hidden, np.ones((len(hidden), 1))]), compute_uv=False)


@pytest.mark.slow
@pytest.mark.parametrize("width", [120, 40])
def test_the_ranks_are_those_of_their_moments(make_trainer, make_module, make_loader, recorder, width):
    trunks = Trunks()
    guard = ExpressivityGuard(
        switch_at=SWITCH, track_rank=True, noise_scale=1e-2, method="auto" if width == 120 else "alignment"
    )
    loader = make_loader()
    make_trainer([trunks, guard], max_epochs=4, logger=recorder).fit(make_module(width=width), loader)
    assert guard.phase == 2
    inputs, known = loader.dataset.tensors[0], {}
    for moment, trunk in trunks.seen.items():
        values = singular_values(trunk, inputs)
        known[moment] = values[95] if len(values) == 96 else 0.0
        name = "rank" if moment == "after" else f"rank_{moment}"
        at = 0 if moment == "at_start" else SWITCH
        assert recorder.scalars[f"guard/{name}"][at] == int((values > 1e-11 * values[0]).sum())
        if moment != "after" or width == 120:
            name = "sigma_min" if moment == "after" else f"sigma_min_{moment}"
            assert recorder.scalars[f"guard/{name}"][at] == pytest.approx(known[moment], rel=1e-6)
            assert recorder.scalars[f"guard/{name}_lower"][at] <= known[moment]
    if width == 120:
        assert len(set(known.values())) == 3  # three different networks
    assert "guard/rank_before_noise" not in {tag for tag, seen in recorder.scalars.items() if 0 in seen}


def test_without_being_asked_nothing_is_tracked_and_the_run_is_the_same(
    make_trainer, make_module, make_loader, recorder
):
    def run(track):
        module = make_module()
        guard = ExpressivityGuard(switch_at=SWITCH, track_rank=track)
        make_trainer([guard], max_epochs=4, logger=recorder).fit(module, make_loader())
        return module.state_dict(), guard

    plain, guard = run(False)
    assert not any("before_noise" in tag or "at_start" in tag for tag in recorder.scalars)
    tracked, other = run(True)
    assert all(torch.equal(value, tracked[name]) for name, value in plain.items())
    assert guard.history == other.history


@pytest.mark.slow
def test_a_resumed_run_still_knows_them(tmp_path, make_trainer, make_module, make_loader):
    def guard():
        return ExpressivityGuard(switch_at=SWITCH, track_rank=True)

    first = guard()
    make_trainer([first], max_epochs=3, checkpoint=True).fit(make_module(), make_loader())
    second = guard()
    trainer = make_trainer([second], max_epochs=4)
    trainer.fit(make_module(seed=4), make_loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    for name in ("rank_at_start", "rank_before_noise", "sigma_min_before_noise"):
        assert float(trainer.callback_metrics[f"guard/{name}"]) > 0
    assert second.state_dict()["ranks"] == first.state_dict()["ranks"]
