"""Every step of phase 2 is looked at: its samples and targets, its features, its loss, the gradient and who moves the head."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard
from tests.callbacks.guard.certify.nets import CLASSES, LATE, LOSSES, SAMPLES, SWITCH, WIDTH, Net, table, undecided


class TrainMode(Net):
    def on_train_batch_start(self, batch, batch_idx):
        if self.late:
            self.train()


class ScaleForTheStep(Net):
    def on_train_batch_start(self, batch, batch_idx):
        self.scale = 0.0 if self.late else 1.0

    def on_train_batch_end(self, *_):
        self.scale = 1.0


class Mixup(Net):
    mates = None

    def on_train_batch_start(self, batch, batch_idx):
        self.mates = torch.arange(len(batch[0])).roll(1) if self.late else None

    def on_train_batch_end(self, *_):
        self.mates = None

    def forward(self, x):
        h = self.trunk(x)
        return self.head(h if self.mates is None else (h + h[self.mates]) / 2)


class Flipped(Net):
    """Strong augmentation in the step, closed before the end of the run."""

    def training_step(self, batch, batch_idx):
        x = batch[0].flip(1) if self.current_epoch in (3, 4) else batch[0]
        return self.loss(self(x), batch[1])


class HeadTwice(Net):
    def training_step(self, batch, batch_idx):
        u = self(batch[0])
        return self.loss(u + (self.head(0 * self.trunk(batch[0])) if self.current_epoch == LATE else 0), batch[1])


@pytest.mark.parametrize("loss_fn", LOSSES, ids=["functional", "module"])
@pytest.mark.parametrize("module", [TrainMode, ScaleForTheStep, Mixup, Flipped])
def test_features_that_are_others_in_some_steps(fit, module, loss_fn):
    undecided(fit(module(loss_fn)), "a training step computes other features than those that were certified")


def test_features_that_could_not_be_compared(fit):
    assert fit(HeadTwice()).verdict == "undecided"


class InPlace(pl.Callback):
    """Changes the batch after the guard saw it."""

    def __init__(self, which):
        self.which = which

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.late:
            batch[self.which].mul_(0)


class Replaced(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.late:
            batch[1] = batch[1].flip(0)


@pytest.mark.parametrize("other", [InPlace(0), InPlace(1), Replaced()], ids=["inputs", "targets", "another tensor"])
def test_a_batch_that_is_changed_after_the_guard_saw_it(fit, other):
    undecided(fit(Net(), other), "a batch was changed between the start of its step and the call of the head")


class Noisy(Dataset):
    """Targets that are drawn anew at every read."""

    def __init__(self, of_labels):
        self.table, self.of_labels = table(), of_labels

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x, y = self.table[index]
        if self.of_labels:
            return x, torch.randint(0, CLASSES, ()) if torch.rand(()) < 0.5 else y
        return x, F.one_hot(y, CLASSES).float() + torch.randn(CLASSES)


@pytest.mark.parametrize("rule", ["base", "solve"])
@pytest.mark.parametrize("of_labels", [True, False])
def test_random_targets(fit, of_labels, rule):
    loss_fn = nn.CrossEntropyLoss() if of_labels else nn.MSELoss()
    guard = fit(Net(loss_fn), data=Noisy(of_labels), guard=ExpressivityGuard(SWITCH, step_rule=rule))
    undecided(guard, "inputs or targets are random when they are read")


class Relabelled(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        if module.late:
            tensors = trainer.train_dataloader.dataset.tensors
            trainer.train_dataloader.dataset.tensors = (tensors[0], tensors[1].flip(0))


def test_targets_that_change_during_the_run(fit):
    undecided(fit(Net(), Relabelled()), "a batch holds samples that were not certified")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["base", "certified", "solve"])
def test_a_run_that_is_resumed_with_other_targets_or_without_the_bias(fit, make_trainer, tmp_path, rule):
    def guard():
        return ExpressivityGuard(SWITCH, step_rule=rule)

    first = guard()
    trainer = make_trainer([first], max_epochs=3)
    trainer.fit(Net(nn.CrossEntropyLoss()), DataLoader(table(), 8))
    assert (first.phase, first.verdict) == (2, "certified")
    trainer.save_checkpoint(path := tmp_path / "kept.ckpt")
    other = table(torch.randint(0, CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(9)))
    undecided(fit(Net(nn.CrossEntropyLoss()), data=other, guard=guard(), ckpt=path), "the training set is another one")
    frozen = Net(nn.CrossEntropyLoss())
    frozen.head.bias.requires_grad_(False)
    undecided(fit(frozen, guard=guard(), ckpt=path), "the head's bias is trained now and was not")


class FrozenBias(Net):
    def on_train_epoch_start(self):
        if self.late:
            self.head.bias.requires_grad_(False)


def test_a_bias_that_is_frozen_during_the_run(fit):
    undecided(fit(FrozenBias()), "the head's bias is trained now and was not, or the other way round")


class Shrinking(Net):
    def on_before_optimizer_step(self, optimizer):
        if self.late:
            self.head.weight.grad.add_(self.head.weight, alpha=0.2)


class Clipping(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.late:
            self.head.weight.grad.add_(self.head.weight, alpha=0.2)


class Clamped(Net):
    def on_before_optimizer_step(self, optimizer):
        self.head.weight.data.clamp_(-0.01, 0.01)


class PostHook(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()

        def shrink(*_):
            self.head.weight.data.mul_(0.99)

        optimizer.register_step_post_hook(shrink)
        return optimizer


@pytest.mark.parametrize("loss_fn", LOSSES, ids=["functional", "module"])
@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Shrinking, "changes the gradient of the head between the backward pass and the optimizer's step"),
        (Clipping, "changes the gradient of the head between the backward pass and the optimizer's step"),
        (Clamped, "moved the head between the backward pass and the optimizer's step"),
        (PostHook, "moved the head between two steps"),
    ],
)
def test_what_acts_between_the_guard_and_the_optimizer(fit, module, said, loss_fn):
    undecided(fit(module(loss_fn)), said)


class Masked(Net):
    """Targets of one batch do not count from the fifth epoch on."""

    def training_step(self, batch, batch_idx):
        kept = (batch[1] != CLASSES - 1) | (not self.late)
        return (F.cross_entropy(self(batch[0]), batch[1], reduction="none") * kept).mean()


@pytest.mark.parametrize("loss_fn", LOSSES, ids=["functional", "module"])
def test_another_loss_of_a_batch_in_the_middle_late_in_the_run(fit, loss_fn):
    x, y = table().tensors
    order = (
        (y[:, None] == torch.tensor([0, 2, 1])).float().argmax(1).argsort(stable=True)
    )  # class 2 stands in the middle
    undecided(fit(Masked(loss_fn), data=TensorDataset(x[order], y[order])), "changes during the run")


class Skipping(Net):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.late and batch_idx == 1 else None


def test_batches_that_a_hook_skips(fit):
    undecided(fit(Skipping()), "a batch was skipped, because a hook returned -1")


class Fewer(pl.Callback):
    """Draws the first sample in place of the second one."""

    def on_train_epoch_start(self, trainer, module):
        if module.late:
            trainer.train_dataloader.sampler.__class__.__iter__ = lambda _: iter([0, 0, *range(2, SAMPLES)])


def test_an_epoch_that_does_not_draw_every_sample(fit, monkeypatch):
    sampler = torch.utils.data.SequentialSampler
    monkeypatch.setattr(sampler, "__iter__", sampler.__iter__)  # is put back
    undecided(fit(Net(), Fewer()), "an epoch did not draw every training sample equally often")


@pytest.mark.parametrize(
    "step",
    [
        lambda m, x, y: F.mse_loss(m(x), y - y.mean(0)),
        lambda m, x, y: F.mse_loss(m(x), (y - y.mean(0)) / y.std(0)),
        lambda m, x, y: F.mse_loss(m(x), y.roll(1, 0)),
        lambda m, x, y: F.mse_loss(m(x), y.argsort(0).float()),
        lambda m, x, y: (F.mse_loss(m(x), y, reduction="none").mean(1) * torch.arange(len(x)).float()).mean(),
    ],
    ids=["centred", "standardised", "rolled", "ranks", "weights by place"],
)
def test_targets_or_weights_that_a_step_makes_of_its_batch(fit, step):
    class Own(Net):
        def training_step(self, batch, batch_idx):
            return step(self, *batch)

    targets = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(4))
    guard = fit(Own(), data=table(targets), shuffle=True)
    assert guard.phase == 2
    assert guard.verdict == "undecided"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_plain_loss_of_targets_and_weights_of_the_samples_is_certified(fit, reduction):
    class Own(Net):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0]), batch[1], reduction=reduction)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    targets = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(4))
    guard = fit(Own(), data=table(targets), shuffle=True)
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


@pytest.mark.parametrize("rule", ["base", "certified", "solve"])
@pytest.mark.parametrize("noise", [1e-9, 1e-10])
def test_targets_that_are_almost_in_reach_are_not_reached(fit, rule, noise):
    """By least squares in float64 the loss of every head is above that of the noise alone, times the share of its free directions."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    y = 1e8 * (x @ torch.randn(4, CLASSES, generator=generator, dtype=torch.float64))
    y += noise * 1e8 * torch.randn(y.shape, generator=generator, dtype=torch.float64)

    class Linear(Net):
        def __init__(self):
            super().__init__(nn.MSELoss())
            self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-20)

    guard = ExpressivityGuard(SWITCH, method="alignment", step_rule=rule)
    fit(Linear(), data=TensorDataset(x, y), guard=guard, precision="64-true")
    least = torch.cat([x, torch.ones(SAMPLES, 1, dtype=torch.float64)], 1)
    residual = y - least @ torch.linalg.lstsq(least, y).solution
    assert residual.square().mean() > 0.1 * (noise * 1e8) ** 2
    assert guard.verdict != "certified"


def test_samples_that_float64_cannot_tell_apart_are_not_certified(fit):
    """x - mean(x) of x and of x + t is the same; with a large t rounding tells them apart."""

    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(1, keepdim=True)

    class Cancelling(Net):
        def __init__(self):
            super().__init__(nn.CrossEntropyLoss())
            self.trunk = nn.Sequential(Centred(), nn.Linear(4, WIDTH), nn.Softplus(10, 40.0))

    x, y = table().tensors
    x = x.double()
    x[-1] = x[-2] + 1e14
    guard = fit(Cancelling(), data=TensorDataset(x, y), precision="64-true")
    assert guard.verdict != "certified"


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_step_that_cannot_train_the_head_on_a_frozen_trunk_ends_no_run(fit, reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(self.head, self.trunk(x), use_reentrant=reentrant)

    guard = fit(Checkpointed())
    assert guard.phase == (1 if reentrant else 2)
    assert guard.verdict == ("undecided" if reentrant else "certified")
    assert ("has no gradient, so the head cannot be trained" in guard.reason) == reentrant


class OwnPenaltySteps(Net):
    """Every fifth step is one of regularisation alone; the head is called for the accuracy."""

    def training_step(self, batch, batch_idx):
        u = self(batch[0])
        if self.global_step % 5 == 3:
            return 0.05 * self.head.weight.square().sum() + 0 * self.head.bias.sum()
        return self.loss(u, batch[1])


class PastTheHead(Net):
    """Every fifth step takes the head's weights past the head."""

    def training_step(self, batch, batch_idx):
        u, h = self(batch[0]), self.trunk(batch[0])
        if self.global_step % 5 == 3:
            u = F.linear(h, 1.01 * self.head.weight, self.head.bias)
        return self.loss(u, batch[1])


class Twice(Net):
    """Every fifth step differentiates twice."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch[0]), batch[1])
        if self.global_step % 5 == 3:
            (slope,) = torch.autograd.grad(loss, self.head.weight, create_graph=True)
            loss = loss + slope.square().sum()
        return loss


@pytest.mark.parametrize("module", [OwnPenaltySteps, PastTheHead, Twice])
def test_steps_whose_gradient_cannot_be_compared(fit, module):
    assert (guard := fit(module())).verdict == "undecided"
    assert guard.phase == 2


def test_a_step_that_differentiates_by_the_outputs_for_its_log_is_certified(fit):
    class Logging(Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(u := self(batch[0]), batch[1])
            (slope,) = torch.autograd.grad(loss, u, retain_graph=True)
            self.log("slope", slope.norm())
            return loss

    assert (guard := fit(Logging())).verdict == "certified", (guard.why, guard.caveats)


class Copies(pl.Callback):
    """What everyday callbacks do: an average of the weights, a copy of the best model, a file of the whole module."""

    def __init__(self, folder):
        self.folder, self.models = folder, []

    def on_train_batch_end(self, trainer, module, *_):
        copied = copy.deepcopy(module.head)
        torch.save(module.head, self.folder / "head.pt")
        self.models += [copied, torch.load(self.folder / "head.pt", weights_only=False), AveragedModel(module.trunk)]


@pytest.mark.parametrize("first", [True, False])
def test_copies_of_the_head_take_nothing_of_the_guard_along(make_trainer, tmp_path, first):
    guard, copies = ExpressivityGuard(switch_at=SWITCH), Copies(tmp_path)
    module = Net(nn.CrossEntropyLoss())
    make_trainer([copies, guard] if first else [guard, copies], max_epochs=6).fit(module, DataLoader(table(), 8))
    assert (guard.verdict, guard.caveats) == ("certified", [])
    x = torch.randn(2, WIDTH)
    assert torch.equal(copies.models[-3](x), module.head(x))
    assert torch.equal(copies.models[-2](x), module.head(x))


class Arrays(Dataset):
    """Labels that are no tensors, and other ones from the fifth epoch on."""

    def __init__(self, kind):
        self.module, self.kind, self.table = None, kind, table()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x, y = self.table[index]
        return x, int(y + (self.module.late if self.module is not None else 0)) % CLASSES

    def collate(self, samples):
        x, y = torch.stack([s[0] for s in samples]), [s[1] for s in samples]
        if self.kind == "array":
            return x, np.array(y)
        return SimpleNamespace(x=x, y=torch.tensor(y)) if self.kind == "object" else (x, [str(each) for each in y])


@pytest.mark.parametrize("kind", ["array", "strings", "object"])
@pytest.mark.parametrize("change", [False, True])
def test_labels_that_are_no_tensors_are_known_as_well(make_trainer, kind, change):
    class Own(Net):
        def training_step(self, batch, batch_idx):
            x, y = (batch.x, batch.y) if kind == "object" else batch
            return F.cross_entropy(self(x), torch.tensor([int(each) for each in y]))

    data, module = Arrays(kind), Own()
    data.module = module if change else None
    guard = ExpressivityGuard(switch_at=SWITCH, input_fn=lambda b: b.x if kind == "object" else b[0])
    make_trainer([guard], max_epochs=6).fit(module, DataLoader(data, 8, collate_fn=data.collate, shuffle=True))
    assert guard.phase == 2
    assert guard.verdict == ("undecided" if change else "certified"), (guard.why, guard.caveats)


@pytest.mark.parametrize("weights", [3, 4, 8])
def test_dict_batches_with_a_tensor_for_all_samples_that_the_step_takes_apart(make_trainer, weights):
    class Own(Net):
        def training_step(self, batch, batch_idx):
            y = batch.pop("y")
            batch["h"] = self(batch["x"])
            return F.cross_entropy(batch["h"], y) + 0 * batch["w"].sum()

    def collate(samples):
        x, y = torch.utils.data.default_collate(samples)
        return {"w": torch.arange(float(weights)), "x": x, "y": y}

    guard = ExpressivityGuard(switch_at=SWITCH)
    loader = DataLoader(table(), 8, collate_fn=collate, shuffle=weights != 8)
    make_trainer([guard], max_epochs=6).fit(Own(), loader)
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


class Data(pl.Callback):
    """Changes targets in ways that torch does not count."""

    def __init__(self, way):
        self.way = way

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.late:
            self.way(batch[1])


@pytest.mark.parametrize(
    "way",
    [lambda y: y.data.fill_(0), lambda y: y.numpy().fill(0), lambda y: np.random.shuffle(y.numpy())],  # noqa: NPY002
)
def test_targets_that_are_changed_behind_the_back_of_torch(fit, way):
    undecided(fit(Net(), Data(way)), "a batch was changed between the start of its step and the call of the head")


def test_a_large_column_does_not_hide_the_others(fit):
    """A raw column of a million stands beside the features, which are missing in some steps."""

    class Wide(Net):
        def __init__(self):
            super().__init__(nn.CrossEntropyLoss(), WIDTH)
            self.head = nn.Linear(WIDTH + 1, CLASSES)

        def forward(self, x):
            deep = self.trunk(x) * (self.global_step % 5 != 3)
            return self.head(torch.cat([deep, 1e6 * x[:, :1]], 1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-14)

    guard = fit(Wide())
    assert guard.phase == 1 or guard.verdict == "undecided"


@pytest.mark.parametrize("noise", [0.3, 0.0])
def test_columns_that_are_zero_in_the_first_batch_do_not_hide_the_others(fit, noise):
    """Rare binary columns stand beside the features, whose inputs are noisy in the fourth and fifth of six epochs."""

    class Rare(Net):
        def __init__(self):
            super().__init__(nn.CrossEntropyLoss())
            self.head = nn.Linear(WIDTH + 5, CLASSES)

        def forward(self, x):
            return self.head(torch.cat([self.trunk(x[:, :4]), x[:, 4:]], 1))

        def training_step(self, batch, batch_idx):
            x = batch[0].clone()
            if self.current_epoch in (3, 4):
                x[:, :4] += noise * torch.randn_like(x[:, :4])
            return self.loss(self(x), batch[1])

    x, y = table().tensors
    rare = torch.zeros(SAMPLES, 5)
    rare[range(9, 14), range(5)] = 1.0
    guard = fit(Rare(), data=TensorDataset(torch.cat([x, rare], 1), y))
    assert guard.phase == 2
    assert guard.verdict == ("undecided" if noise else "certified"), (guard.why, guard.caveats)


def test_a_plain_relu_trunk_with_units_that_are_dead_in_a_batch(make_trainer):
    torch.manual_seed(0)
    module = Net(nn.CrossEntropyLoss())
    module.trunk, module.head = nn.Sequential(nn.Linear(32, 200), nn.ReLU()), nn.Linear(200, CLASSES)
    data = TensorDataset(torch.rand(150, 32), torch.randint(0, CLASSES, (150,)))
    guard = ExpressivityGuard(switch_at=SWITCH)
    make_trainer([guard], max_epochs=3).fit(module, DataLoader(data, 25, shuffle=True))
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


class Smoothed(Net):
    """Label smoothing in the fourth and fifth of seven epochs; an accuracy by a second forward, or several evaluations of the step."""

    lbfgs = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            self.accuracy = (self(x).argmax(1) == y).float().mean()
        return F.cross_entropy(self(x), y, label_smoothing=0.3 * (self.current_epoch in (3, 4)))

    def configure_optimizers(self):
        if self.lbfgs:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        return super().configure_optimizers()


@pytest.mark.parametrize("lbfgs", [False, True])
@pytest.mark.parametrize("loss_fn", LOSSES, ids=["functional", "module"])
def test_a_loss_that_is_another_one_for_some_epochs(fit, loss_fn, lbfgs):
    module = Smoothed(loss_fn)
    module.lbfgs = lbfgs
    assert (guard := fit(module, max_epochs=7)).phase == 2
    assert guard.verdict == "undecided"


class Ensembling(Net):
    """Targets are mixed with what the network said after earlier epochs."""

    def __init__(self, loss_fn=None):
        super().__init__(loss_fn)
        self.said = torch.zeros(SAMPLES, CLASSES)

    def training_step(self, batch, batch_idx):
        u = self(batch[0])
        kept = self.said[8 * batch_idx : 8 * batch_idx + len(u)]
        return self.loss(u, batch[1]) + F.mse_loss(u.softmax(1), kept)

    @torch.no_grad()
    def on_train_epoch_end(self):
        self.said = 0.5 * self.said + 0.5 * self(table().tensors[0]).softmax(1)


def test_targets_that_are_remade_after_every_epoch(fit):
    undecided(fit(Ensembling()), "the loss of the training step changes during the run")


class PastTheTrainer(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if not self.late:
            return optimizer.step(closure=optimizer_closure)
        optimizer_closure()
        self.head.weight.grad.add_(self.head.weight, alpha=0.1)
        return self.trainer.optimizers[0].step()


def test_steps_that_are_made_past_the_trainer(fit):
    assert fit(PastTheTrainer()).verdict == "undecided"


def test_noise_below_the_rounding_of_features_is_random_all_the_same(fit):
    class Jitter(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(self(batch[0] + 1e-7 * torch.randn_like(batch[0])), batch[1])

    undecided(fit(Jitter()), "the features of the training step are random")


def test_a_ragged_end_that_is_dropped_from_shuffled_epochs_is_no_matter(make_trainer):
    guard = ExpressivityGuard(switch_at=3)
    loader = DataLoader(table(), 7, shuffle=True, drop_last=True)
    make_trainer([guard], max_epochs=4).fit(Net(nn.CrossEntropyLoss()), loader)
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


class Swap(pl.Callback):
    """Goes on with another optimizer, and a norm that is held, from the fifth epoch on."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == LATE:
            trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), lr=0.01)]

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.late:
            module.head.weight.data.clamp_(-0.02, 0.02)


class Ascending(pl.Callback):
    """Lets every fifth step ascend, by a setting that is put back after it."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        trainer.optimizers[0].param_groups[0]["maximize"] = trainer.global_step % 5 == 3

    def on_train_batch_end(self, trainer, *_):
        trainer.optimizers[0].param_groups[0]["maximize"] = False


@pytest.mark.parametrize("other", [Swap(), Ascending()], ids=["another optimizer", "steps that ascend"])
def test_an_optimizer_that_is_another_one_in_some_steps(fit, other):
    assert fit(Net(), other).verdict == "undecided"


def test_a_step_that_writes_into_an_object_writes_into_a_copy(make_trainer):
    class Writing(Net):
        def training_step(self, batch, batch_idx):
            batch.x.mul_(0.5)
            return F.cross_entropy(self(batch.x), batch.y)

    def weights(callbacks):
        torch.manual_seed(7)
        module, data = Writing(), Arrays("object")
        make_trainer(callbacks, max_epochs=3).fit(module, DataLoader(data, 8, collate_fn=data.collate))
        return module.state_dict()

    plain = weights([])
    watched = weights([ExpressivityGuard(switch_at=10**6, input_fn=lambda b: b.x)])
    assert all(torch.equal(plain[name], each) for name, each in watched.items())


def test_a_frozen_teacher_is_part_of_the_loss(fit):
    class Distilled(Net):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(4, CLASSES).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                soft = self.teacher(batch[0]).softmax(1)
            return F.cross_entropy(self(batch[0]), soft)

    guard = fit(Distilled())
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


class Shorter(pl.Callback):
    """Ends epochs after two of three batches, from the fifth one on."""

    def on_train_epoch_start(self, trainer, module):
        if module.late:
            trainer.fit_loop.max_batches = 2


def test_epochs_that_end_early(fit):
    undecided(fit(Net(), Shorter()), "an epoch ended before its last batch")


def test_a_run_that_ends_inside_an_epoch_is_certified(fit):
    guard = fit(Net(nn.CrossEntropyLoss()), max_epochs=-1, max_steps=16)
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])
