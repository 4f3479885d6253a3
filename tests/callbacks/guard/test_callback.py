"""The guard switches at tau, certifies, freezes the trunk bit for bit, and says what it did."""

from __future__ import annotations

import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.data import TensorDataset

from lightning_conv.callbacks import ExpressivityError, ExpressivityGuard

SWITCH = 6  # of 15 steps: the end of epoch 2 of 5


class Trace(pl.Callback):
    """Trunk tensors, head weight and gradients after every step."""

    def __init__(self):
        self.trunk, self.head, self.grads, self.training = [], [], [], []

    def on_after_backward(self, trainer, pl_module):
        self.grads.append({name for name, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.training.append(any(module.training for module in pl_module.modules()))

    def on_train_batch_end(self, trainer, pl_module, *args):
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.head.append({name: value for name, value in state.items() if name.startswith("classifier")})
        self.trunk.append({name: value for name, value in state.items() if not name.startswith("classifier")})


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.fixture
def guarded_run(make_trainer, make_module, make_loader):
    """Network, guard and trace of a run of 15 steps that switches at step 6."""

    def run(guard=None, module=None, data=None, **kwargs):
        guard = ExpressivityGuard(switch_at=SWITCH) if guard is None else guard
        module = make_module() if module is None else module
        trace = Trace()
        trainer = make_trainer([guard, trace], **kwargs)
        trainer.fit(module, make_loader(data))
        return module, guard, trace, trainer

    return run


def test_phase_one_trains_everything_and_phase_two_only_the_head(guarded_run):
    _, guard, trace, _ = guarded_run()
    assert guard.phase == 2
    assert guard.head_name == "classifier"
    for before, after in zip(trace.trunk[: SWITCH - 1], trace.trunk[1:SWITCH], strict=True):
        assert not same(before, after)
    # trace[SWITCH - 1] is taken after the switch: noise included.
    assert all(same(trace.trunk[SWITCH - 1], later) for later in trace.trunk[SWITCH:])
    for before, after in zip(trace.head[SWITCH - 1 : -1], trace.head[SWITCH:], strict=True):
        assert not same(before, after)


def test_the_trunk_is_not_back_propagated_through_and_runs_in_eval_mode(guarded_run):
    _, _, trace, _ = guarded_run()
    assert all(len(names) > 2 for names in trace.grads[:SWITCH])
    assert all(names == {"classifier.weight", "classifier.bias"} for names in trace.grads[SWITCH:])
    assert all(trace.training[:SWITCH])
    assert not any(trace.training[SWITCH:])


def test_the_noise_is_what_the_guard_says_and_is_in_every_trunk_tensor(
    guarded_run, make_trainer, make_module, make_loader
):
    _, guard, trace, _ = guarded_run(ExpressivityGuard(switch_at=SWITCH, noise_scale=1e-2))
    plain = Trace()
    make_trainer([plain]).fit(make_module(), make_loader())
    names = [name for name, _ in make_module().named_parameters() if not name.startswith("classifier")]
    change = [trace.trunk[SWITCH - 1][name] - plain.trunk[SWITCH - 1][name] for name in names]
    assert all(bool((delta != 0).any()) for delta in change)
    norm = np.sqrt(sum(float(delta.double().square().sum()) for delta in change))
    assert norm == pytest.approx(guard.perturbation.norm, rel=1e-6)
    assert guard.perturbation.relative == pytest.approx(1e-2, rel=0.1)


def test_before_the_switch_the_run_is_bit_for_bit_the_run_without_the_guard(
    guarded_run, make_trainer, make_module, make_loader
):
    module, _, trace, _ = guarded_run()
    plain, plain_trace = make_module(), Trace()
    make_trainer([plain_trace]).fit(plain, make_loader())
    assert module.losses[:SWITCH] == plain.losses[:SWITCH]
    assert same(trace.trunk[SWITCH - 2], plain_trace.trunk[SWITCH - 2])
    assert same(trace.head[SWITCH - 1], plain_trace.head[SWITCH - 1])


def test_the_certificate_agrees_with_numpy_on_the_float64_trunk(guarded_run, make_loader):
    module, guard, _, _ = guarded_run()
    inputs = make_loader().dataset.tensors[0]
    hidden = module.double().eval().trunk(inputs.double()).detach().numpy()
    values = np.linalg.svd(np.hstack([hidden, np.ones((96, 1))]), compute_uv=False)
    assert guard.certificate.verdict == "certified"
    assert (guard.certificate.rank_lower, guard.certificate.n) == (96, 96)
    assert guard.certificate.sigma_min.lower <= values[95] * (1 + 1e-10)
    assert guard.certificate.sigma_min.upper >= values[95] * (1 - 1e-10)


def test_rounding_inside_a_float64_trunk_is_allowed_for_too(guarded_run, make_module, make_loader):
    inputs, targets = make_loader().dataset.tensors
    _, guard, _, _ = guarded_run(module=make_module().double(), data=TensorDataset(inputs.double(), targets))
    assert guard.certificate.verdict == "certified"
    assert 0 < guard.certificate.feature_error < 1e-9


def test_loss_and_gap_are_of_the_whole_training_set_and_fall_every_epoch(guarded_run, make_loader):
    module, guard, _, trainer = guarded_run()
    assert [entry["step"] for entry in guard.history] == [6, 9, 12, 15]
    losses = [entry["loss"] for entry in guard.history]
    assert losses == sorted(losses, reverse=True)
    inputs, targets = make_loader().dataset.tensors
    expected = nn.functional.cross_entropy(module.eval()(inputs).double(), targets).detach()
    assert losses[-1] == pytest.approx(float(expected), rel=1e-9)
    assert float(trainer.callback_metrics["guard/gap"]) == pytest.approx(float(expected), rel=1e-6)


def test_the_event_file_tells_phase_rank_sigma_gap_and_reason(tmp_path, guarded_run):
    _, _, _, trainer = guarded_run(logger=TensorBoardLogger(tmp_path, default_hp_metric=False))
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert {"guard/phase", "guard/gap", "convergence/log10_gap"} <= set(tags["scalars"])
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    unchanged = {f"guard/{name}" for name in ("rank", "samples", "sigma_min", "noise")}
    assert unchanged <= set(settings)
    assert settings["guard/rank"].number_value == 96
    assert unchanged | {"guard/loss", "convergence/phase", "convergence/gap"} <= set(trainer.callback_metrics)
    phases = {event.step: event.value for event in events.Scalars("guard/phase")}
    assert phases == {0: 1.0, 3: 1.0, 6: 2.0, 9: 2.0, 12: 2.0, 15: 2.0}
    text = events.Tensors("guard/reason/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "96 / 96" in text
    assert "classifier" in text


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
def test_no_optimizer_state_moves_the_trunk(guarded_run, make_module, optimizer):
    module = make_module()
    options = {"lr": 1e-3} if optimizer is torch.optim.LBFGS else {"lr": 1e-3, "weight_decay": 0.1}
    module.configure_optimizers = lambda: optimizer(module.parameters(), **options)
    _, guard, trace, _ = guarded_run(module=module)
    assert guard.phase == 2
    assert all(same(trace.trunk[SWITCH - 1], later) for later in trace.trunk[SWITCH:])
    assert not same(trace.head[SWITCH - 1], trace.head[-1])


def test_something_that_moves_the_trunk_voids_the_guarantee_aloud(guarded_run, make_trainer, make_module, make_loader):
    class Meddler(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            with torch.no_grad():
                pl_module.trunk[0].bias[0] += 1e-6

    guard = ExpressivityGuard(switch_at=SWITCH)
    with pytest.warns(UserWarning, match="the trunk moved during phase 2"):
        make_trainer([guard, Meddler()]).fit(make_module(), make_loader())


@pytest.fixture
def twins(make_loader):
    """Training data in which samples 3 and 50 are the same."""
    inputs, targets = (tensor.clone() for tensor in make_loader().dataset.tensors)
    inputs[50] = inputs[3]
    return TensorDataset(inputs, targets)


def test_undecided_and_warn_takes_the_noise_back_and_trains_on(
    guarded_run, make_trainer, make_module, make_loader, twins
):
    plain, plain_trace = make_module(), Trace()
    make_trainer([plain_trace]).fit(plain, make_loader(twins))
    with pytest.warns(UserWarning, match=r"samples 3 and 50 are equal.*Training of all layers goes on"):
        module, guard, trace, _ = guarded_run(data=twins)
    assert guard.phase == 1
    assert "samples 3 and 50" in guard.reason
    assert module.losses == plain.losses
    assert same(trace.trunk[-1], plain_trace.trunk[-1])


def test_undecided_and_raise_stops_with_the_reason(guarded_run, twins):
    with pytest.raises(ExpressivityError, match="samples 3 and 50 are equal"):
        guarded_run(ExpressivityGuard(switch_at=SWITCH, on_undecided="raise"), data=twins)


def test_undecided_and_continue_enters_phase_two_and_says_not_certified(guarded_run, twins):
    _, guard, trace, _ = guarded_run(ExpressivityGuard(switch_at=SWITCH, on_undecided="continue"), data=twins)
    assert guard.phase == 2
    assert "NOT certified" in guard.reason
    assert guard.certificate.rank_lower == 95
    assert all(same(trace.trunk[SWITCH - 1], later) for later in trace.trunk[SWITCH:])


def test_a_head_narrower_than_the_training_set_is_said_at_the_start(guarded_run, make_module):
    with pytest.raises(ExpressivityError, match=r"m_H \+ 1 = 51 < n = 96.*at least 95"):
        guarded_run(ExpressivityGuard(on_undecided="raise"), module=make_module(width=50))
    with pytest.warns(UserWarning, match="too narrow"):
        _, guard, _, _ = guarded_run(module=make_module(width=50))
    assert guard.phase == 1


def test_a_network_without_a_last_linear_layer_is_refused_with_candidates(guarded_run, make_module):
    module = make_module()
    module.forward = lambda x: module.classifier(module.trunk(x)).log_softmax(1)
    module.loss_fn = nn.NLLLoss()
    with pytest.raises(MisconfigurationException, match=r'head: no nn.Linear.*"trunk.0", "trunk.4", "classifier"'):
        guarded_run(module=module)
    _, guard, _, _ = guarded_run(ExpressivityGuard(switch_at=SWITCH, head="classifier"), module=module)
    assert guard.phase == 2


def test_nan_features_leave_the_condition_undecided_with_a_sample_named(guarded_run, make_loader):
    inputs, targets = (tensor.clone() for tensor in make_loader().dataset.tensors)
    inputs[7] = float("nan")
    with pytest.warns(UserWarning, match=r"sample \d+ \(and \d+ more\) has NaN"):
        _, guard, _, _ = guarded_run(data=TensorDataset(inputs, targets))
    assert guard.phase == 1


@pytest.mark.parametrize("part", [1, 3])
def test_a_run_killed_in_either_phase_resumes_to_the_same_numbers(
    tmp_path, make_trainer, make_module, make_loader, part
):
    class Kill(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == part and batch_idx == 1:
                raise KeyboardInterrupt

    whole_guard, whole = ExpressivityGuard(switch_at=SWITCH), make_module(dropout=0.0)
    make_trainer([whole_guard]).fit(whole, make_loader())

    killed = make_trainer([ExpressivityGuard(switch_at=SWITCH), Kill()], checkpoint=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning turns the first into the second
        killed.fit(make_module(dropout=0.0), make_loader())

    guard, module = ExpressivityGuard(switch_at=SWITCH), make_module(seed=9, dropout=0.0)
    make_trainer([guard]).fit(module, make_loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert module.losses == whole.losses[3 * part :]
    assert guard.history == whole_guard.history
    assert guard.certificate.sigma_min == whole_guard.certificate.sigma_min
    assert same(whole.state_dict(), module.state_dict())


def test_the_module_is_handed_back_trainable(guarded_run):
    module, guard, _, _ = guarded_run()
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert guard.phase == 2


def test_what_the_user_froze_gets_no_noise_and_stays_frozen(guarded_run, make_module):
    module = make_module()
    module.trunk[0].requires_grad_(False)
    frozen = module.trunk[0].weight.clone()
    module, guard, _, _ = guarded_run(module=module)
    assert guard.phase == 2
    assert torch.equal(module.trunk[0].weight, frozen)
    assert not module.trunk[0].weight.requires_grad


@pytest.mark.parametrize(
    "kwargs",
    [{"switch_at": 1.0}, {"switch_at": -1}, {"switch_at": True}, {"noise_scale": 0.0}, {"on_undecided": "ignore"}],
)
def test_a_bad_argument_is_named(kwargs):
    with pytest.raises(MisconfigurationException, match=next(iter(kwargs))):
        ExpressivityGuard(**kwargs)


def test_a_share_of_an_endless_run_is_refused(make_trainer, make_module, make_loader):
    with pytest.raises(MisconfigurationException, match=r"switch_at: 0\.6 is a share"):
        make_trainer([ExpressivityGuard()], max_epochs=-1).fit(make_module(), make_loader())


def test_several_optimizers_and_manual_optimization_are_refused(make_trainer, make_module, make_loader):
    module = make_module()
    module.automatic_optimization = False
    with pytest.raises(
        MisconfigurationException, match=r"use automatic optimization with one optimizer \(its parameter groups"
    ):
        make_trainer([ExpressivityGuard()]).fit(module, make_loader())


def test_an_unknown_loss_is_said_to_leave_the_gap_out(guarded_run, make_module):
    class OwnLoss(nn.CrossEntropyLoss):
        """May compute anything."""

    module = make_module()
    module.loss_fn = OwnLoss()
    with pytest.warns(UserWarning, match="infimum of OwnLoss is not known"):
        _, guard, _, trainer = guarded_run(module=module)
    assert "guard/gap" not in trainer.callback_metrics
    assert "loss" in guard.history[-1]


def test_the_guard_pickles_and_its_state_loads_with_weights_only(tmp_path, guarded_run):
    _, guard, _, _ = guarded_run()
    torch.save(guard.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = ExpressivityGuard(switch_at=SWITCH)
    other.load_state_dict(state)
    assert other.certificate == guard.certificate
    assert pickle.loads(pickle.dumps(other)).phase == 2
