"""A group of callbacks in one entry of the trainer's list does what its members would do by themselves."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_conv.callbacks import ConvergenceCriteria, ConvergenceDiagnostics, KernelStability, LambdaMin, Probe
from lightning_conv.callbacks.run.callbacks import all_callbacks, callbacks_of, stored_state
from lightning_conv.callbacks.run.group import CallbackGroup


def overridden(kind):
    hooks = [name for name in vars(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
    return {name for name in hooks if getattr(kind, name) is not getattr(pl.Callback, name)}


def test_every_hook_of_a_member_is_one_of_the_group():
    for member in ConvergenceDiagnostics().callbacks:
        # Whoever is in the group finds its state through the group's own ``on_load_checkpoint``.
        assert overridden(type(member)) <= overridden(CallbackGroup)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("grouped_later", [True, False])
def test_a_checkpoint_of_a_group_serves_a_list_and_the_other_way_round(
    make_trainer, make_module, make_loader, tmp_path, grouped, grouped_later
):
    def callbacks(as_group):
        made = ConvergenceDiagnostics(Probe(8), every_n_steps=1)
        return [made] if as_group else made.callbacks

    first = make_trainer(callbacks(grouped), max_epochs=1, checkpoint=True, logger=CSVLogger(tmp_path))
    first.fit(make_module(), make_loader())
    path = first.checkpoint_callback.last_model_path or first.checkpoint_callback.best_model_path
    before = {type(each): each.state_dict() for each in callbacks_of(first, KernelStability | LambdaMin)}
    later = callbacks(grouped_later)
    second = make_trainer(later, max_epochs=1)
    second.fit(make_module(), make_loader(), ckpt_path=path)
    for each in callbacks_of(second, KernelStability | LambdaMin):
        assert each.state_dict()["metrics"] == before[type(each)]["metrics"]
    (criteria,) = callbacks_of(second, ConvergenceCriteria)
    assert [seen.step for seen in criteria.history] == list(range(first.global_step + 1))


def test_the_state_of_a_callback_is_found_by_itself_and_in_a_group():
    checkpoint = {
        "callbacks": {"LambdaMin": {"a": 1}, "Group": {"KernelStability": {"b": 2}, "LambdaMin": {"c": 3}}, "Other": 5}
    }
    assert stored_state(checkpoint, "LambdaMin") == {"a": 1}
    assert stored_state(checkpoint, "KernelStability") == {"b": 2}
    assert stored_state(checkpoint, "ConvergenceCriteria") is None
    assert stored_state({}, "LambdaMin") is None


class Counts(pl.Callback):
    """Counts its hooks of a batch."""

    def __init__(self):
        self.steps = 0

    def on_train_batch_end(self, *args):
        self.steps += 1


class Resting(Counts):
    """Has nothing to do in any later batch."""

    rests_until = float("inf")
    notes_steps = False


def test_a_member_that_says_nothing_is_called_in_every_batch_and_one_that_rests_is_not(
    make_trainer, make_module, make_loader
):
    for kind, called in ((Counts, 4), (Resting, 1)):
        member = kind()
        make_trainer([CallbackGroup([member])], max_steps=4).fit(make_module(), make_loader())
        assert member.steps == called


def test_members_follow_their_group_in_the_order_of_the_callbacks(make_trainer):
    group = ConvergenceDiagnostics()
    trainer = make_trainer([group], enable_checkpointing=True)
    found = all_callbacks(trainer)
    at = found.index(group)
    assert found[at + 1 : at + 6] == group.members


def test_while_a_monitor_rests_a_step_looks_at_the_clock_alone(make_trainer, make_module, make_loader, monkeypatch):
    looked = []
    due = KernelStability._is_due
    monkeypatch.setattr(KernelStability, "_is_due", lambda self, trainer: looked.append(1) or due(self, trainer))
    monitor = KernelStability(Probe(8))
    begun = time.monotonic()
    make_trainer([monitor], max_epochs=3).fit(make_module(), make_loader())
    assert monitor.rests_until > begun
    assert len(looked) < 3  # the first one, in which the copy of the weights is forgotten
