"""``step_rule="solve"``: the head's problem is solved to a certified gap at the switch, and the run ends with that reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ExpressivityGuard

SWITCH = 6


@pytest.fixture
def solve(make_trainer, make_module):
    def go(data, loss_fn=None, width=120, callbacks=(), change=None, guard=None, **options):
        module = make_module(width=width)
        if loss_fn is not None:
            module.loss_fn = loss_fn
        if change is not None:
            change(module)
        module.configure_optimizers = lambda: torch.optim.SGD(
            module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1
        )
        guard = guard or ExpressivityGuard(switch_at=SWITCH, step_rule="solve", tol=1e-5)
        trainer = make_trainer([guard, *callbacks], **({"max_epochs": 20} | options))
        trainer.fit(module, DataLoader(data, 32))
        return guard, module, trainer

    return go


def loss_of(module, data):
    """On the whole set, in float64, of the weights as the module holds them."""
    with torch.no_grad():
        outputs = module.double().eval()(data.tensors[0].double())
        targets = data.tensors[1].double() if data.tensors[1].is_floating_point() else data.tensors[1]
        return float(module.loss_fn(outputs, targets))


@pytest.mark.parametrize("name", ["squared", "cross-entropy"])
def test_the_loss_is_within_tol_of_the_global_infimum_and_the_run_stops(solve, data, one_hot_digits, name):
    samples = one_hot_digits if name == "squared" else data
    guard, module, trainer = solve(samples, nn.MSELoss() if name == "squared" else None)
    assert trainer.global_step == SWITCH
    assert trainer.should_stop
    assert (guard.phase, guard.verdict) == (2, "certified")
    assert "training stops" in guard.reason
    last = guard.history[-1]
    assert last["step"] == SWITCH
    assert 0 <= last["gap"] <= last["bound"] <= 1e-5
    assert loss_of(module, samples) <= 1e-5
    assert float(trainer.callback_metrics["guard/bound"]) == pytest.approx(last["bound"])


def test_a_run_that_must_go_on_keeps_the_solution(solve, data):
    guard, module, trainer = solve(data, min_epochs=5)
    assert trainer.global_step == 15
    assert loss_of(module, data) <= 1e-5
    assert len({entry["loss"] for entry in guard.history}) == 1


def test_a_stop_that_another_callback_asked_for_stays(solve, data):
    stop = EarlyStopping("guard/phase", patience=0, mode="min", check_on_train_epoch_end=True)
    _, _, trainer = solve(data, callbacks=[stop])
    assert trainer.should_stop


def test_a_narrow_head_is_solved_to_its_own_infimum(solve, data, one_hot_digits):
    def tanh(module):
        module.trunk[5] = nn.Tanh()

    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="solve", method="alignment", tol=1e-5)
    _, module, _ = solve(one_hot_digits, nn.MSELoss(), width=20, change=tanh, guard=guard)
    assert guard.phase == 2
    assert guard.verdict != "certified"
    assert "infimum over heads on these features" in guard.reason
    with torch.no_grad():
        hidden = module.double().eval().trunk(data.tensors[0].double()).numpy()
    columns, targets = np.hstack([hidden, np.ones((96, 1))]), one_hot_digits.tensors[1].double().numpy()
    rest = targets - columns @ np.linalg.lstsq(columns, targets, rcond=None)[0]
    best = (rest**2).mean()
    assert best <= loss_of(module, one_hot_digits) <= best + 1e-5


@pytest.mark.parametrize("name", ["squared", "cross-entropy"])
def test_the_best_loss_of_a_narrow_heads_trunk_is_reported(make_trainer, make_module, data, one_hot_digits, name):
    samples = one_hot_digits if name == "squared" else data
    module, guard = make_module(width=20), ExpressivityGuard(switch_at=SWITCH, method="alignment", tol=1e-4)
    module.trunk[5] = nn.Tanh()
    module.loss_fn = nn.MSELoss() if name == "squared" else nn.CrossEntropyLoss()
    trainer = make_trainer([guard])
    trainer.fit(module, DataLoader(samples, 32))
    best = float(trainer.callback_metrics["guard/best_loss"])
    assert "of this trunk" in guard.reason
    assert all(entry["loss"] >= best - 1e-4 for entry in guard.history)
    if name == "squared":
        assert guard.certificate.residual.value**2 * float(samples.tensors[1].square().mean()) == pytest.approx(
            best, abs=2e-4
        )


def test_a_resumed_run_that_was_solved_stops_at_once_with_the_same_head(
    tmp_path, make_trainer, make_module, make_loader
):
    def guard():
        return ExpressivityGuard(switch_at=SWITCH, step_rule="solve", tol=1e-5)

    first, module = guard(), make_module()
    make_trainer([first], checkpoint=True).fit(module, make_loader())
    resumed, other = guard(), make_module(seed=9)
    trainer = make_trainer([resumed], max_epochs=9)
    trainer.fit(other, make_loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert trainer.global_step == SWITCH
    assert resumed.reason == first.reason
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_what_cannot_be_solved_goes_on_by_the_optimizer_and_is_said(monkeypatch, solve, data):
    import lightning_conv.callbacks.guard.head.solved as room

    def fail(*args, **kwargs):
        raise MemoryError("does not fit")

    monkeypatch.setattr(room, "solve_head", fail)
    with pytest.warns(UserWarning, match="step_rule='solve' could not be set up .MemoryError: does not fit"):
        guard, _, trainer = solve(data, max_epochs=4)
    assert trainer.global_step == 12
    assert guard.verdict == "undecided"
    assert guard.history[-1]["loss"] < guard.history[0]["loss"]


@pytest.fixture
def after_one_iteration(monkeypatch):
    """The solver gives up early."""
    import lightning_conv.callbacks.guard.head.solved as room

    solve = room.solve_head
    monkeypatch.setattr(
        room, "solve_head", lambda *args, **kwargs: solve(*args, **kwargs, max_iterations=1, method="lbfgs")
    )


def test_a_head_that_is_not_solved_goes_on_from_the_better_one_by_the_optimizer(after_one_iteration, solve, data):
    with pytest.warns(
        UserWarning, match="the last layer could not be solved by .*the run goes on by its own optimizer"
    ):
        guard, _, trainer = solve(data, max_epochs=6)
    assert trainer.global_step == 18
    assert "nothing left to train" not in guard.reason
    assert "could not be solved" in guard.reason
    assert all("bound" not in entry for entry in guard.history)
    assert guard.history[-1]["loss"] < guard.history[0]["loss"]
    # The optimizer that moves the head now decays it.
    assert (guard.certificate.verdict, guard.verdict) == ("certified", "undecided")
    assert "weight decay on the head" in guard.reason


def test_a_solution_that_is_worse_than_the_head_is_not_taken(monkeypatch, solve, data):
    import lightning_conv.callbacks.guard.head.solved as room

    find, heads = room.solve_head, []

    def worse(problem, *, start, **options):
        heads.append(problem.value(problem.stack(*start)).value)
        found = find(problem, start=start, **options, max_iterations=1, method="lbfgs")
        far = replace(found, weight=100 * found.weight, bias=100 * found.bias)
        loss = problem.value(problem.stack(*far.layer()))
        return replace(far, rounded_loss=loss)

    monkeypatch.setattr(room, "solve_head", worse)
    with pytest.warns(UserWarning, match="could not be solved"):
        guard, _, _ = solve(data, max_epochs=4)
    assert guard.history[0]["loss"] == pytest.approx(heads[0], rel=1e-5)


def test_a_loss_of_the_callers_own_is_solved_to_the_infimum_that_he_gives(solve, data, one_hot_digits):
    def squared(outputs, targets):
        return (outputs - targets).square().mean()

    def change(module):
        del module.loss_fn
        module.loss_fn = squared

    guard = ExpressivityGuard(switch_at=SWITCH, step_rule="solve", tol=1e-2, loss_fn=squared, infimum=0.0)
    _, _, trainer = solve(one_hot_digits, guard=guard, change=change)
    assert trainer.global_step == SWITCH
    assert "numbers given by the caller; training stops" in guard.reason
    assert all("bound" not in entry for entry in guard.history)


def test_features_are_cached_only_where_the_run_goes_on(monkeypatch, solve, data, request):
    import lightning_conv.callbacks.guard.head.phase_two as room

    filled, cache = [], room.FeatureCache

    def counted(*args):
        filled.append(1)
        return cache(*args)

    monkeypatch.setattr(room, "FeatureCache", counted)

    def guard():
        return ExpressivityGuard(switch_at=SWITCH, step_rule="solve", tol=1e-5, cache_features=True)

    solve(data, guard=guard())
    assert filled == []
    request.getfixturevalue("after_one_iteration")
    with pytest.warns(UserWarning, match="could not be solved"):
        solve(data, guard=guard(), max_epochs=4)
    assert filled == [1]


def test_features_that_do_not_fit_into_memory_are_streamed(monkeypatch, solve, data):
    import lightning_conv.callbacks.guard.head.problem as room

    # Half of a quarter of this holds no 96 x 120 features in float64.
    monkeypatch.setattr(room, "available_memory", lambda device: 4 * 100_000)
    guard, module, _ = solve(data)
    assert "training stops" in guard.reason
    assert loss_of(module, data) <= 1e-5
