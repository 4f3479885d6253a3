"""A run that is interrupted at the switch, or that resumes with other settings, claims no more than holds."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ExpressivityGuard

EPOCHS = 4
"""In which the settings are the same; a full batch is one step."""


def guard(rule="base"):
    return ExpressivityGuard(switch_at=2, step_rule=rule, tol=1e-5)


@pytest.fixture
def parts(tmp_path, make_trainer, make_module, make_loader):
    """Runs a guard after the other, each from the last one's checkpoint, with its own loss, batch size and share of batches."""

    def run(*guards, batch_sizes=(96, 96, 96), scales=(1, 1, 1), limits=(1.0, 1.0, 1.0)):
        folder = tmp_path / "checkpoints"
        for part, callback in enumerate(guards):
            module = make_module(seed=part, dropout=0.0)
            module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
            step, scale = module.training_step, scales[part]
            module.training_step = lambda *given, step=step, scale=scale: scale * step(*given)
            save = ModelCheckpoint(dirpath=folder, save_last=True, enable_version_counter=False)
            options = {"enable_checkpointing": True, "limit_train_batches": limits[part]}
            trainer = make_trainer([callback, save], max_epochs=EPOCHS * (part + 1), **options)
            loader = DataLoader(make_loader().dataset, batch_sizes[part])
            trainer.fit(module, loader, ckpt_path=folder / "last.ckpt" if part else None)
        return trainer, module

    return run


def test_certified_steps_that_resume_as_a_solved_head_are_solved(parts):
    first, second = guard("certified"), guard("solve")
    trainer, _ = parts(first, second)
    assert (first.phase, second.phase) == (2, 2)
    assert trainer.global_step == EPOCHS
    assert "resumed with step_rule='solve'; the last layer is solved" in second.reason
    assert second._state.steps["bound"] <= 1e-5
    assert second.verdict == "certified"


def test_a_solved_head_that_resumes_with_certified_steps_is_bounded_from_there(parts):
    second = guard("certified")
    trainer, _ = parts(guard("solve"), second)
    assert trainer.global_step == 2 * EPOCHS
    assert "step_size" in second.history[-1]
    assert all(entry["gap"] <= entry["bound"] <= 1.1e-5 for entry in second.history)


def test_certified_steps_do_not_count_from_before_another_rule_moved_the_head(parts):
    last = guard("certified")
    # What is minimised in between throws the head far from where it was.
    trainer, _ = parts(guard("certified"), guard("base"), last, scales=(1, 1000, 1))
    assert trainer.global_step == 3 * EPOCHS
    entries = [entry for entry in last.history if "bound" in entry]
    before, after = ([e for e in entries if (e["step"] > 2 * EPOCHS) is late] for late in (False, True))
    assert len(after) == EPOCHS
    assert after[0]["bound"] > 5 * before[-1]["bound"]
    assert all(entry["gap"] <= entry["bound"] * (1 + 1e-6) for entry in entries)
    assert last._state.steps["taken"] == EPOCHS


def test_certified_steps_on_other_batches_are_planned_anew(parts):
    second = guard("certified")
    parts(guard("certified"), second, batch_sizes=(96, 32))
    steps = {"before": [e for e in second.history if e["step"] <= EPOCHS]}
    steps["after"] = [e for e in second.history if e["step"] > EPOCHS]
    assert all("bound" in entry for entry in steps["before"])
    assert all("bound" not in entry for entry in steps["after"])
    assert max(e["step_size"] for e in steps["after"]) < steps["before"][-1]["step_size"]


@pytest.mark.parametrize("part", [0, 1])
def test_what_limits_a_part_of_phase_two_limits_the_run(parts, part):
    second = guard()
    parts(guard(), second, batch_sizes=(48, 48), limits=(0.5, 1.0) if part == 0 else (1.0, 0.5))
    assert second.caveats == ["only 1 of 2 batches are trained on in an epoch"]
    assert (second.certificate.verdict, second.verdict) == ("certified", "undecided")
    assert second.reason.count("only 1 of 2 batches") == 1


def test_what_showed_in_the_run_is_remembered(parts):
    second = guard()
    with pytest.warns(UserWarning, match="minimises something else"):
        parts(guard(), second, scales=(2, 1))
    assert second.verdict == "undecided"
    assert "minimises something else" in second.caveats[0]


@pytest.mark.parametrize("scales", [(96, 96), (96, 1)])
def test_certified_steps_that_were_given_up_stay_so(parts, scales):
    first, second = guard("certified"), guard("certified")
    with pytest.warns(UserWarning, match="no bound holds"):
        parts(first, second, scales=scales)
    assert all("bound" not in entry for entry in second.history[1:])
    assert second.verdict == "undecided"
    assert second._state.steps == {"rule": "base", "asked": "certified"}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["during the certificate", "while the trunk is written down"])
def test_an_interrupt_at_the_switch_leaves_no_noise_behind(
    monkeypatch, tmp_path, make_trainer, make_module, make_loader, where
):
    import lightning_conv.callbacks.guard.certify.attempt as room
    from lightning_conv.callbacks.guard.head.trunk import FrozenTrunk

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    whole_guard, whole = ExpressivityGuard(switch_at=6), make_module(dropout=0.0)
    make_trainer([whole_guard]).fit(whole, make_loader())
    plain = make_module(dropout=0.0)
    make_trainer(max_epochs=2).fit(plain, make_loader())

    folder = tmp_path / "checkpoints"
    save = ModelCheckpoint(dirpath=folder, save_on_exception=True)
    killed, module = ExpressivityGuard(switch_at=6), make_module(dropout=0.0)
    with monkeypatch.context() as patch:
        if where == "during the certificate":
            patch.setattr(room, "certify_trunk", interrupt)
        else:
            patch.setattr(FrozenTrunk, "fingerprints", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            make_trainer([killed, save], enable_checkpointing=True).fit(module, make_loader())
    assert (killed.phase, killed.perturbation) == (1, None)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name

    (saved,) = folder.glob("*step=6.ckpt")
    for name, value in torch.load(saved, weights_only=True)["state_dict"].items():
        assert torch.equal(value, plain.state_dict()[name]), name
    resumed_guard, resumed = ExpressivityGuard(switch_at=6), make_module(seed=9, dropout=0.0)
    make_trainer([resumed_guard]).fit(resumed, make_loader(), ckpt_path=saved)
    assert resumed_guard.perturbation == whole_guard.perturbation
    losses, expected = ([entry["loss"] for entry in g.history] for g in (resumed_guard, whole_guard))
    assert losses == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
