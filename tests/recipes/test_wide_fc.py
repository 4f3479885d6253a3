"""What the recipe `wide_fc` promises: sizes, checkpoints that need no data, callbacks that yield to the user's."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn

from lightning_conv.callbacks import ExpressivityGuard, KernelStability, LambdaMin
from lightning_conv.recipes import DigitsDataModule, WideFC, wide_fc
from lightning_conv.wide_layer import wide_layer_width


@pytest.fixture
def data():
    return DigitsDataModule(test_fraction=0.9)  # 179 training samples


@pytest.mark.parametrize(("n", "factor", "width"), [(1437, 1.1, 1581), (10, 1.1, 11), (100, 1.1, 110), (7, 0.5, 4)])
def test_the_wide_layer_has_the_width_factor_times_n_rounded_up(n, factor, width):
    assert wide_layer_width(n, factor) == width


def test_the_network_is_a_narrow_softplus_trunk_and_one_linear_head():
    network = wide_fc(64, 10, width=200, hidden=[128, 96])
    assert [name for name, _ in network.named_children()] == ["trunk", "head"]
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert [module.out_features for module in linear] == [128, 96, 200, 10]
    assert network.head is linear[-1]
    assert all(isinstance(module, nn.Linear | nn.Softplus | nn.Flatten) for module in [*network.trunk, network.head])


def test_the_softplus_is_the_analytic_formula_in_float64():
    activation = wide_fc(1, 1, width=1).trunk[2]
    z = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert torch.allclose(activation(z), torch.logaddexp(100 * z, torch.zeros(())) / 100, rtol=1e-15, atol=0)


@pytest.mark.parametrize("argument", ["in_features", "num_classes", "width", "beta"])
def test_sizes_that_are_not_positive_are_refused_by_name(argument):
    sizes = {"in_features": 4, "num_classes": 2, "width": 8, "beta": 100.0}
    with pytest.raises(ValueError, match=f"{argument}: must be positive, got 0"):
        wide_fc(**{**sizes, argument: 0})


def test_sizes_come_from_the_data_and_a_checkpoint_needs_no_data(quiet_trainer, data, tmp_path):
    module = WideFC(guard=False, diagnostics=False)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, data)
    sizes = {name: module.hparams[name] for name in ("in_features", "num_classes", "width")}
    assert sizes == {"in_features": 64, "num_classes": 10, "width": wide_layer_width(179)}
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = WideFC.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    inputs = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(inputs), module(inputs))


def test_without_sizes_or_data_the_error_names_the_argument():
    with pytest.raises(MisconfigurationException, match=r"in_features: is None.*WideFC\(in_features=\.\.\.\)"):
        WideFC()(torch.rand(1, 64))


def test_the_recipe_brings_its_callbacks_and_a_guard_that_switches(quiet_trainer, data):
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(WideFC(), data)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert all(kinds.count(kind) == 1 for kind in (KernelStability, LambdaMin, ExpressivityGuard))
    guard = next(callback for callback in trainer.callbacks if isinstance(callback, ExpressivityGuard))
    assert guard.phase == 2
    assert guard.head_name == "net.head"
    assert {"train_loss", "val_loss", "val_acc", "guard/phase", "kernel/lambda_min"} <= set(trainer.callback_metrics)


def test_a_callback_of_the_user_takes_precedence(quiet_trainer, data):
    guard = ExpressivityGuard(switch_at=1)
    trainer = quiet_trainer(max_epochs=1, callbacks=[guard])
    trainer.fit(WideFC(diagnostics=False), data)
    assert [callback for callback in trainer.callbacks if isinstance(callback, ExpressivityGuard)] == [guard]
    assert guard.phase == 2


def test_guard_and_diagnostics_can_be_left_out():
    assert WideFC(guard=False, diagnostics=False).configure_callbacks() == []


def test_logged_accuracy_is_the_share_of_correct_answers(quiet_trainer, data):
    module = WideFC(guard=False, diagnostics=False)
    trainer: Trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, data)
    logged = trainer.test(module, data, verbose=False)[0]
    inputs, labels = data.splits.test.tensors
    with torch.no_grad():
        logits = module(inputs)
    assert logged["test_acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert logged["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
