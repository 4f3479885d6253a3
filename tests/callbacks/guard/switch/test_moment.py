"""``switch_at="auto"``: where the training loss comes to rest and the condition is certified, and the same after a resume."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_conv.callbacks import ExpressivityError, ExpressivityGuard
from lightning_conv.callbacks.guard.switch.moment import Plateau, switch_step


def follow(losses, **options):
    """The windows after which the loss counts as at rest."""
    plateau = Plateau(**({"window": 1, "threshold": 0.1, "patience": 2} | options))
    reached = []
    for index, loss in enumerate(losses):
        plateau.observe(torch.tensor(loss, dtype=torch.float64))
        if plateau.reached:
            reached.append(index)
    return reached


def test_the_plateau_rule_is_that_of_torchs_scheduler():
    """ReduceLROnPlateau cuts the rate when it has counted patience + 1 windows that were not better."""
    generator = torch.Generator().manual_seed(0)
    losses = [3 * 0.9**k + 0.3 * float(torch.rand((), generator=generator)) for k in range(60)]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3, threshold=0.05, threshold_mode="rel")
    first = None
    for index, loss in enumerate(losses):
        scheduler.step(loss)
        if first is None and optimizer.param_groups[0]["lr"] < 1:
            first = index
    assert first is not None
    assert follow(losses, threshold=0.05, patience=4)[0] == first


def test_windows_are_averaged_and_a_window_that_is_not_finite_does_not_count():
    noisy = [4.0, 2.0, 3.1, 3.1, 3.0, 3.2, 3.1, 3.0]  # means 3, 3.1, 3.1, 3.05
    assert follow(noisy, window=2) == [5, 6, 7]
    assert follow([3.0, float("nan"), float("inf"), 3.0, float("nan"), 3.0]) == [5]
    assert follow([-1.0, -1.05, -1.2, -1.21, -1.22], patience=2) == [4]


def test_after_failed_tries_the_rule_waits_twice_as_long_each_time():
    plateau, due = Plateau(window=1, threshold=0.1, patience=1), []
    for window in range(20):
        plateau.observe(torch.tensor(1.0))
        if plateau.reached:
            due.append(window)
            plateau.failed()
    assert due == [1, 2, 4, 8, 16]


def test_the_memory_of_the_rule_is_plain_and_complete():
    losses = torch.rand(23, generator=torch.Generator().manual_seed(1)).double()
    whole = Plateau(window=4, threshold=0.1, patience=1)
    for loss in losses:
        whole.observe(loss)
    part = Plateau(window=4, threshold=0.1, patience=1)
    for loss in losses[:10]:
        part.observe(loss)
    resumed = Plateau(**part.as_plain())
    for loss in losses[10:]:
        resumed.observe(loss)
    assert resumed.as_plain() == whole.as_plain()
    assert all(value is None or type(value) in (int, float) for value in whole.as_plain().values())


def test_a_share_leaves_a_step_for_phase_two():
    assert [switch_step(share, 10) for share in (0.01, 0.5, 0.55, 0.999)] == [1, 5, 6, 9]
    assert switch_step(7, 3) == 7


AUTO = {"switch_at": "auto", "plateau_patience": 1, "plateau_threshold": 0.3}
REST = AUTO | {"plateau_threshold": 0.99}  # at rest from the second window on


@pytest.fixture
def auto_run(make_trainer, make_module, make_loader):
    def run(module=None, data=None, max_epochs=12, **settings):
        guard = ExpressivityGuard(**(AUTO | settings))
        module = make_module(dropout=0.0) if module is None else module
        make_trainer([guard], max_epochs=max_epochs).fit(module, make_loader(data))
        return guard, module

    return run


def test_the_guard_switches_after_the_first_epoch_that_was_not_better(auto_run):
    guard, module = auto_run()
    assert guard.phase == 2
    means = [sum(module.losses[start : start + 3]) / 3 for start in range(0, 36, 3)]
    best, expected = means[0], None
    for epoch, mean in enumerate(means[1:], start=1):
        if mean < best * 0.7:
            best = mean
        else:
            expected = epoch
            break
    assert guard.history[0]["step"] == 3 * (expected + 1)


def test_a_loss_that_keeps_falling_switches_at_the_latest_share(auto_run):
    guard, _ = auto_run(plateau_threshold=1e-6, plateau_patience=50, latest_switch=0.8)
    assert guard.history[0]["step"] == 29  # ceil(0.8 * 36)
    guard, _ = auto_run(plateau_patience=50, latest_switch=0.999)
    assert guard.history[0]["step"] == 35


def test_uncertified_plateaus_are_tried_again_without_a_trace_and_given_up_at_the_last(
    monkeypatch, make_trainer, make_module, make_loader
):
    import lightning_conv.callbacks.guard.certify.attempt as room

    tries = []

    def fail(*args):
        tries.append(len(module.losses))
        raise ValueError("not yet")

    def run(guards):
        trainer = make_trainer(guards, max_epochs=12)
        trainer.fit(module, make_loader())
        return module

    module = make_module(dropout=0.0)
    plain = run([]).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(room, "certify_trunk", fail)
        module, guard = make_module(dropout=0.0), ExpressivityGuard(**REST, latest_switch=0.95)
        with pytest.warns(UserWarning, match=r"not yet.*Training of all layers goes on"):
            run([guard])
    assert guard.phase == 1
    assert guard.verdict == "undecided"
    first = tries[0]
    assert tries == [step for step in (first, first + 3, first + 9, first + 21) if step < 35] + [35]
    for name, value in plain.items():
        assert torch.equal(value, module.state_dict()[name]), name

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 24

    with monkeypatch.context() as patch:
        patch.setattr(room, "certify_trunk", fail)
        module, guard = make_module(dropout=0.0), ExpressivityGuard(**REST)
        with pytest.warns(UserWarning, match=r"the run ended at step 24; .*not yet"):
            run([guard, Stop()])
        assert "came to rest" not in guard.reason

    with monkeypatch.context() as patch:
        patch.setattr(room, "certify_trunk", fail)
        module = make_module(dropout=0.0)
        with pytest.raises(ExpressivityError, match="not yet"):
            run([ExpressivityGuard(**REST, on_undecided="raise")])
        assert len(module.losses) == 33  # ceil(0.9 * 36)


def test_what_is_refuted_for_good_is_not_tried_again(auto_run, make_loader):
    inputs, targets = (tensor.clone() for tensor in make_loader().dataset.tensors)
    inputs[50] = inputs[3]
    with pytest.warns(UserWarning, match="samples 3 and 50 are equal"):
        guard, module = auto_run(data=TensorDataset(inputs, targets))
    assert (guard.phase, guard.verdict) == (1, "undecided")
    assert guard.certificate.verdict == "refuted"
    assert "goes on" not in guard.reason
    assert len(module.losses) == 36


@pytest.fixture
def certificates(monkeypatch):
    """The steps at which a certificate was computed."""
    import lightning_conv.callbacks.guard.certify.attempt as room

    taken, certify = [], room.certify_trunk

    def counted(view, *args, **options):
        taken.append(view.trainer.global_step)
        return certify(view, *args, **options)

    monkeypatch.setattr(room, "certify_trunk", counted)
    return taken


def test_what_is_refuted_enters_phase_two_at_once_where_that_is_asked_for(auto_run, make_loader, certificates):
    inputs, targets = (tensor.clone() for tensor in make_loader().dataset.tensors)
    inputs[50] = inputs[3]
    guard, module = auto_run(data=TensorDataset(inputs, targets), on_undecided="continue", **REST)
    assert (guard.phase, guard.certificate.verdict) == (2, "refuted")
    assert "NOT certified" in guard.reason
    assert certificates == [int(guard.history[0]["step"])] == [6]
    assert len(module.losses) == 36


def test_what_is_undecided_is_tried_again_before_phase_two_begins_without_it(auto_run, monkeypatch):
    import lightning_conv.callbacks.guard.certify.attempt as room

    tries = []

    def fail(view, *args, **options):
        tries.append(view.trainer.global_step)
        raise ValueError("not yet")

    monkeypatch.setattr(room, "certify_trunk", fail)
    guard, _ = auto_run(on_undecided="continue", **(REST | {"latest_switch": 0.95}))
    assert (guard.phase, guard.verdict) == (2, "undecided")
    assert tries == [6, 9, 15, 27, 35]
    assert guard.history[0]["step"] == 35


def test_a_loss_on_a_device_without_float64_is_observed(on_apple, make_trainer, make_module, make_loader):
    """Apple's GPUs have none: ``double`` raises there."""

    class Apple(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            outputs["loss"] = outputs["loss"].as_subclass(on_apple)

    guard, module = ExpressivityGuard(**REST), make_module(dropout=0.0)
    make_trainer([Apple(), guard], max_epochs=3).fit(module, make_loader())
    assert guard.history[0]["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", [2, 8])
def test_a_run_killed_before_or_after_the_plateau_resumes_to_the_same_numbers(
    tmp_path, make_trainer, make_module, make_loader, killed_in
):
    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == killed_in and batch_idx == 1:
                raise KeyboardInterrupt

    def guard():
        # Seven batches: a window never ends where an epoch does, so its memory is in the checkpoint half full.
        return ExpressivityGuard(**REST, plateau_window=7, cache_features=True)

    whole_guard, whole = guard(), make_module(dropout=0.0)
    make_trainer([whole_guard], max_epochs=12).fit(whole, make_loader())
    assert whole_guard.history[0]["step"] == 14
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer([guard(), Kill()], max_epochs=12, checkpoint=True).fit(make_module(dropout=0.0), make_loader())
    resumed_guard, module = guard(), make_module(seed=9, dropout=0.0)
    last = tmp_path / "checkpoints" / "last.ckpt"
    make_trainer([resumed_guard], max_epochs=12).fit(module, make_loader(), ckpt_path=last)
    assert module.losses == whole.losses[3 * killed_in :]
    assert resumed_guard.history == whole_guard.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_accumulated_batches_are_observed_at_their_own_loss_and_the_switch_waits_for_a_step(
    make_trainer, make_module, make_loader
):
    guard, module = ExpressivityGuard(**AUTO, plateau_window=2), make_module(dropout=0.0)
    make_trainer([guard], max_epochs=12, accumulate_grad_batches=3).fit(module, make_loader())
    assert guard.phase == 2
    step = int(guard.history[0]["step"])
    means = [sum(module.losses[k : k + 2]) / 2 for k in range(0, 3 * step - 1, 2)]
    best = means[0]
    for mean in means:
        best = mean if mean < 0.7 * best else best
    assert guard._state.plateau.best == pytest.approx(best, rel=1e-6)
