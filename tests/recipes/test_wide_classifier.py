"""What both recipes promise: sizes, checkpoints that need no data, callbacks that yield to the user's, a guard that certifies."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_conv.callbacks import ExpressivityGuard, KernelStability, LambdaMin
from lightning_conv.networks.wide_layer import wide_layer_width
from lightning_conv.recipes import BNResNet, DigitsDataModule, WideFC


def small_wide_fc(**settings):
    return WideFC(probe_size=32, **settings)


def small_bn_resnet(**settings):
    return BNResNet(arch="resnet8", channels=4, probe_size=8, **settings)


@pytest.fixture(params=[small_wide_fc, pytest.param(small_bn_resnet, marks=pytest.mark.slow)])
def recipe(request):
    return request.param


@pytest.fixture
def data():
    return DigitsDataModule(test_fraction=0.9)  # 179 training samples


def guard_of(trainer):
    (guard,) = [callback for callback in trainer.callbacks if isinstance(callback, ExpressivityGuard)]
    return guard


def test_sizes_come_from_the_data_and_a_checkpoint_needs_no_data(recipe, quiet_trainer, data, tmp_path):
    module = recipe(guard=False, diagnostics=False)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, data)
    size_of_inputs = {WideFC: 64, BNResNet: 1}[type(module)]
    assert module.hparams[module.input_setting] == size_of_inputs
    assert (module.hparams["num_classes"], module.hparams["width"]) == (10, wide_layer_width(179))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    inputs = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(inputs), module.eval()(inputs))


def test_without_sizes_or_data_the_error_names_the_argument(recipe):
    module = recipe()
    name = module.input_setting
    with pytest.raises(MisconfigurationException, match=rf"{name}: is None.*{type(module).__name__}\({name}=\.\.\.\)"):
        module(torch.rand(1, 1, 8, 8))


def test_a_setting_that_the_network_refuses_is_told_as_the_users_mistake(recipe, quiet_trainer, data):
    with pytest.raises(MisconfigurationException, match="width: -3; need a whole number of at least 1"):
        quiet_trainer(max_epochs=1).fit(recipe(width=-3), data)


def test_the_recipe_brings_its_callbacks_and_a_guard_that_certifies(recipe, quiet_trainer, data):
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(max_epochs=5)
    module = recipe()
    trainer.fit(module, data)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert all(kinds.count(kind) == 1 for kind in (KernelStability, LambdaMin, ExpressivityGuard))
    guard = guard_of(trainer)
    assert guard.phase == 2
    assert guard.certificate.verdict == "certified", guard.certificate.reason
    assert guard.certificate.rank_lower == guard.certificate.n == 179
    assert guard.head_name == {WideFC: "net.head", BNResNet: "net.fc.head"}[type(module)]
    assert {"train_loss", "val_loss", "val_acc", "guard/phase", "kernel/lambda_min"} <= set(trainer.callback_metrics)
    probes = [c.probe for c in trainer.callbacks if isinstance(c, KernelStability | LambdaMin)]
    assert {(probe.size, probe.batch_norm) for probe in probes} == {(module.hparams["probe_size"], "frozen")}


def test_a_callback_of_the_user_takes_precedence(recipe, quiet_trainer, data):
    guard = ExpressivityGuard(switch_at=1)
    trainer = quiet_trainer(max_epochs=1, callbacks=[guard])
    trainer.fit(recipe(diagnostics=False), data)
    assert guard_of(trainer) is guard
    assert guard.phase == 2


def test_the_guards_settings_are_settings_of_the_recipe(recipe):
    settings = {"switch_at": 7, "method": "distinct", "step_rule": "certified", "cache_features": False}
    (guard,) = recipe(diagnostics=False, **settings).configure_callbacks()
    assert {name: getattr(guard.settings, name) for name in settings} == settings


def test_phase_two_looks_the_features_up_unless_the_images_are_augmented(recipe, quiet_trainer, recwarn):
    for augment in (False, True):
        trainer = quiet_trainer(max_epochs=5)
        trainer.fit(recipe(diagnostics=False), DigitsDataModule(test_fraction=0.9, augment=augment))
        assert guard_of(trainer).phase == 2
        assert any("without cached features" in str(warning.message) for warning in recwarn) == augment


def test_guard_and_diagnostics_can_be_left_out(recipe):
    assert recipe(guard=False, diagnostics=False).configure_callbacks() == []


def test_logged_accuracy_is_the_share_of_correct_answers(recipe, quiet_trainer, data):
    module = recipe(guard=False, diagnostics=False)
    trainer: Trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, data)
    logged = trainer.test(module, data, verbose=False)[0]
    inputs, labels = data.splits.test.tensors
    with torch.no_grad():
        logits = module.eval()(inputs)
    assert logged["test_acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert logged["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("resume_after", [1, 4])  # epochs; the switch is at the end of the third
def test_a_resumed_run_equals_the_uninterrupted_one(recipe, quiet_trainer, data, tmp_path, resume_after):
    def run(**fit):
        checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trainer = quiet_trainer(max_epochs=5, callbacks=[checkpoints], enable_checkpointing=True)
        module = recipe(diagnostics=False)
        trainer.fit(module, data, **fit)
        return module, guard_of(trainer)

    seed_everything(0, verbose=False)
    whole, guard = run()
    torch.manual_seed(1)
    resumed, resumed_guard = run(ckpt_path=tmp_path / f"epoch={resume_after - 1}.ckpt", weights_only=True)
    assert guard.phase == resumed_guard.phase == 2
    assert guard.history == resumed_guard.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
