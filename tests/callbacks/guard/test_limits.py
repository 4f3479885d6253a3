"""What the two-phase rule does not cover is refused, or said; and the module is handed back whatever happens."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_conv.callbacks import ExpressivityGuard, LambdaMin

SWITCH = 6


class FreshNoise(Dataset):
    """Augments: two reads of a sample differ."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.01 * torch.randn(x.shape), y


def test_a_head_without_bias_needs_rank_n_of_h_alone(make_trainer, make_module, make_loader):
    module = make_module(width=95)  # with the column of ones 96 = n, without it 95
    module.classifier = nn.Linear(95, 10, bias=False)
    guard = ExpressivityGuard(switch_at=SWITCH)
    with pytest.warns(UserWarning, match=r"m_H \(no trainable bias\) = 95 < n = 96"):
        make_trainer([guard]).fit(module, make_loader())
    assert guard.phase == 1

    module = make_module()
    module.classifier = nn.Linear(120, 10, bias=False)
    guard = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([guard]).fit(module, make_loader())
    hidden = module.double().eval().trunk(make_loader().dataset.tensors[0].double()).detach().numpy()
    assert guard.certificate.sigma_min.value == pytest.approx(np.linalg.svd(hidden, compute_uv=False)[95], rel=1e-8)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_phase_two_hands_the_module_back(make_trainer, make_module, make_loader, error):
    class Fail(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 9:
                raise error

    module = make_module()
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        make_trainer([ExpressivityGuard(switch_at=SWITCH), Fail()]).fit(module, make_loader())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(part.training for part in module.modules())


def test_after_a_run_the_module_is_in_the_mode_it_was_in(make_trainer, make_module, make_loader):
    module = make_module()
    module.trunk[1].eval()
    make_trainer([ExpressivityGuard(switch_at=SWITCH)]).fit(module, make_loader())
    assert [part.training for part in module.trunk] == [True, False, True, True, True, True]


@pytest.mark.parametrize("how", ["frozen", "left out of the optimizer"])
def test_a_head_that_phase_two_would_not_train_is_refused_at_the_start(make_trainer, make_module, make_loader, how):
    module = make_module()
    if how == "frozen":
        module.classifier.requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD(module.trunk.parameters(), lr=0.1)
    with pytest.raises(MisconfigurationException, match="frozen or not in the optimizer"):
        make_trainer([ExpressivityGuard()]).fit(module, make_loader())


def test_weight_averaging_is_refused(make_trainer, make_module, make_loader):
    with pytest.raises(MisconfigurationException, match="StochasticWeightAveraging replaces the trunk"):
        make_trainer([ExpressivityGuard(), StochasticWeightAveraging(0.1)]).fit(make_module(), make_loader())


def test_of_a_subset_sampler_the_subset_is_what_counts(make_trainer, make_module, data):
    chosen = list(range(0, 96, 3))
    guard, smallest = ExpressivityGuard(switch_at=3), LambdaMin()
    loader = DataLoader(data, batch_size=16, sampler=SubsetRandomSampler(chosen))
    make_trainer([guard, smallest]).fit(make_module(width=40), loader)
    assert guard.certificate.verdict == "certified"
    assert guard.certificate.n == len(chosen)
    assert torch.equal(smallest.state_dict()["inputs"], data.tensors[0][chosen])


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("random inputs", "inputs or targets are random when they are read"),
        ("weighted sampler", "WeightedRandomSampler may weight samples"),
        ("limited batches", "only 2 of 3 batches are trained on"),
        ("weight decay", "weight decay on the head"),
    ],
)
def test_what_limits_the_guarantee_is_said_in_the_reason(make_trainer, make_module, data, case, said):
    module, options, sampler, source = make_module(), {}, None, data
    module.configure_optimizers = lambda: torch.optim.SGD(
        module.parameters(), lr=0.05, weight_decay=0.1 if case == "weight decay" else 0.0
    )
    if case == "random inputs":
        source = FreshNoise(data)
    elif case == "weighted sampler":
        sampler = WeightedRandomSampler(torch.linspace(0.1, 1, 96), 96)
    elif case == "limited batches":
        options["limit_train_batches"] = 2
    guard = ExpressivityGuard(switch_at=4)
    with pytest.warns(UserWarning, match=said):
        make_trainer([guard], **options).fit(module, DataLoader(source, batch_size=32, sampler=sampler))
    assert guard.phase == 2
    assert said in guard.reason


def test_without_such_limits_nothing_is_said(make_trainer, make_module, make_loader):
    module, guard = make_module(), ExpressivityGuard(switch_at=SWITCH)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    make_trainer([guard]).fit(module, make_loader())
    assert guard.caveats == []


def test_squared_loss_of_flat_targets_is_not_broadcast(make_trainer, make_module, data):
    module = make_module()
    module.classifier = nn.Linear(120, 1)
    module.loss_fn = nn.MSELoss()
    module.training_step = lambda batch, batch_idx: module.loss_fn(module(batch[0]).squeeze(-1), batch[1])
    flat = TensorDataset(data.tensors[0], data.tensors[1].float() / 10)
    guard = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([guard]).fit(module, DataLoader(flat, batch_size=32))
    residual = module.eval()(flat.tensors[0]).detach().squeeze(-1).double() - flat.tensors[1].double()
    assert guard.history[-1]["loss"] == pytest.approx(float(residual.square().mean()), rel=1e-9)
    assert guard.history[-1]["gap"] == guard.history[-1]["loss"]


def test_class_weights_count_over_the_whole_set_and_soft_targets_have_no_zero_infimum(make_trainer, make_module, data):
    weights = torch.linspace(0.5, 2, 10)
    module, guard = make_module(), ExpressivityGuard(switch_at=SWITCH)
    module.loss_fn = nn.CrossEntropyLoss(weight=weights)
    make_trainer([guard]).fit(module, DataLoader(data, batch_size=32))
    outputs = module.eval()(data.tensors[0]).detach().double()
    expected = nn.functional.cross_entropy(outputs, data.tensors[1], weight=weights.double())
    assert guard.history[-1]["loss"] == pytest.approx(float(expected), rel=1e-9)

    module, guard = make_module(), ExpressivityGuard(switch_at=SWITCH)
    soft = TensorDataset(data.tensors[0], torch.full((96, 10), 0.1))
    make_trainer([guard]).fit(module, DataLoader(soft, batch_size=32))
    assert guard.history[-1]["loss"] >= math.log(10) * (1 - 1e-6)
    # Not the loss, but what it lies above the entropy of the targets.
    # (0.1 in float32, so that they add up to 1 + 1.5e-8)
    assert guard.history[-1]["gap"] == pytest.approx(guard.history[-1]["loss"] - math.log(10), abs=1e-7)


def test_the_transfer_hooks_of_the_module_are_applied(make_trainer, make_module, data):
    class Scaled(type(make_module())):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 3, batch[1]

    pl.seed_everything(0, verbose=False)
    module, guard, smallest = Scaled(), ExpressivityGuard(switch_at=SWITCH), LambdaMin()
    make_trainer([guard, smallest]).fit(module, DataLoader(data, batch_size=32))
    assert torch.equal(smallest.state_dict()["inputs"], data.tensors[0] * 3)
    expected = nn.functional.cross_entropy(module.eval()(data.tensors[0] * 3).detach().double(), data.tensors[1])
    assert guard.history[-1]["loss"] == pytest.approx(float(expected), rel=1e-9)


def test_a_run_that_ends_before_the_switch_says_so(make_trainer, make_module, make_loader):
    guard = ExpressivityGuard(switch_at=1000)
    with pytest.warns(UserWarning, match="ended at step 15, before the switch at 1000; nothing was certified"):
        make_trainer([guard]).fit(make_module(), make_loader())
    assert guard.phase == 1


def test_a_share_close_to_one_leaves_a_step_for_phase_two(make_trainer, make_module, make_loader):
    guard = ExpressivityGuard(switch_at=0.999)
    make_trainer([guard]).fit(make_module(), make_loader())
    assert [entry["step"] for entry in guard.history] == [14, 15]


def test_a_resumed_run_that_is_made_longer_switches_at_its_share_of_the_new_length(
    tmp_path, make_trainer, make_module, make_loader
):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    first = make_trainer([ExpressivityGuard(switch_at=0.8), Stop()], checkpoint=True, limit_train_batches=2)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        first.fit(make_module(), make_loader())
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    guard = ExpressivityGuard(switch_at=0.8)
    make_trainer([guard], max_epochs=10, limit_train_batches=2).fit(make_module(), make_loader(), ckpt_path=last)
    assert guard.history[0]["step"] == 16


def test_buffers_of_the_module_itself_are_not_the_trunk(make_trainer, make_module, make_loader, recwarn):
    module = make_module()
    module.register_buffer("seen", torch.zeros(()))
    step = type(module).training_step

    def counting(batch, batch_idx):
        module.seen += 1
        return step(module, batch, batch_idx)

    module.training_step = counting
    guard = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([guard]).fit(module, make_loader())
    assert "no longer applies" not in guard.reason


def test_what_early_stopping_monitors_is_there_after_a_resume(tmp_path, make_trainer, make_module, make_loader):
    def callbacks():
        stops = [
            EarlyStopping(name, patience=100, check_on_train_epoch_end=True)
            for name in ("kernel/lambda_min", "guard/phase")
        ]
        return [LambdaMin(every_n_steps=100), ExpressivityGuard(switch_at=4), *stops]

    make_trainer(callbacks(), max_epochs=2, checkpoint=True).fit(make_module(), make_loader())
    trainer = make_trainer(callbacks(), max_epochs=4)
    trainer.fit(make_module(), make_loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert trainer.global_step == 12


def test_a_module_without_forward_is_called_as_its_step_calls_it(make_trainer, make_loader, make_module):
    class TrainingStepOnly(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = make_module()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.inner(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for forward_fn in (None, lambda module, inputs: module.inner(inputs)):
        guard = ExpressivityGuard(switch_at=SWITCH, forward_fn=forward_fn)
        make_trainer([guard]).fit(TrainingStepOnly(), make_loader())
        assert guard.phase == 2
        assert guard.head_name == "inner.classifier"


@pytest.mark.filterwarnings("ignore:Early stopping conditioned on metric")
def test_the_documented_early_stopping_waits_for_phase_two_and_stops_at_the_gap(make_trainer, make_module, make_loader):
    page = (Path(__file__).parents[3] / "docs" / "guard.md").read_text()
    (line,) = [line.strip() for line in page.splitlines() if line.startswith("    EarlyStopping(")]
    stop = eval(line, {"EarlyStopping": EarlyStopping})
    assert stop.stopping_threshold == 1e-4
    stop.stopping_threshold = 2.0  # which ten classes come below at once
    guard = ExpressivityGuard(switch_at=SWITCH)
    trainer = make_trainer([guard, stop], max_epochs=50)
    trainer.fit(make_module(), make_loader())
    assert guard.phase == 2
    assert SWITCH <= trainer.global_step < 150
    assert float(trainer.callback_metrics["guard/gap"]) < 2.0
