"""What changes during a run, or from one part of it to the next, is no longer what was certified."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard

SAMPLES, CLASSES, WIDTH, SWITCH = 24, 3, 30, 6


class Net(pl.LightningModule):
    """A wide network; three batches make an epoch."""

    def __init__(self, optimizer=None):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(4, WIDTH), nn.Softplus(10, 40.0))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.loss_fn, self.scale, self.optimizer = nn.CrossEntropyLoss(), 1.0, optimizer

    def forward(self, x):
        return self.head(self.scale * self.trunk(x))

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters()) if self.optimizer else torch.optim.SGD(self.parameters(), lr=0.05)


def table(samples=SAMPLES):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(samples, 4, generator=generator), torch.randint(0, CLASSES, (samples,), generator=generator)
    )


@pytest.fixture
def fit(make_trainer):
    def go(module, *others, data=None, rule="base", collate_fn=None, shuffle=False, guard=None, **options):
        guard = guard or ExpressivityGuard(switch_at=SWITCH, step_rule=rule)
        loader = DataLoader(data or table(), 8, collate_fn=collate_fn, shuffle=shuffle)
        before, after = (
            [o for o in others if getattr(o, "first", False)],
            [o for o in others if not getattr(o, "first", False)],
        )
        make_trainer([*before, guard, *after], max_epochs=6, **options).fit(module, loader)
        return guard

    return go


def undecided(guard, said):
    assert guard.phase == 2
    assert guard.verdict == "undecided"
    assert said in "; ".join([guard.why, *guard.caveats])


class Scaling(pl.Callback):
    """Scales the features down from the fourth epoch on, by a number that no state dict has."""

    def on_train_epoch_start(self, trainer, module):
        module.scale = 1.0 if trainer.current_epoch < 3 else 0.0


def test_features_that_change_after_the_switch(fit):
    undecided(fit(Net(), Scaling()), "the trunk computes other features")


class Fading(Dataset):
    """Inputs that are zero from the fourth epoch on."""

    def __init__(self):
        self.module, self.table = None, table()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x, y = self.table[index]
        return (0 * x if self.module.current_epoch >= 3 else x), y


def test_a_data_set_that_changes(fit):
    module, data = Net(), Fading()
    data.module = module
    undecided(fit(module, data=data), "a batch holds samples that were not certified")


@pytest.mark.parametrize("rule", ["base", "certified", "solve"])
def test_a_transfer_hook_that_augments_by_the_mode_of_the_module_is_certified_as_phase_two_has_it(fit, rule):
    class Augmented(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] if self.training else torch.zeros_like(batch[0]), batch[1]]

    guard = fit(Augmented(), rule=rule)
    assert guard.phase == 1  # the inputs of phase 2 are all equal, so the rank is 1
    assert guard.declined


class Larger(pl.Callback):
    """Changes the batches in place."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch[0].mul_(1.1)


@pytest.mark.parametrize("first", [True, False])
def test_batches_that_a_callback_changes_before_a_head_is_solved(fit, first):
    larger = Larger()
    larger.first = first
    guard = fit(Net(), larger, rule="solve")
    assert guard.phase == 2
    assert guard.verdict == "undecided"


def centred(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x - x.mean(0), y


def test_a_collate_function_that_mixes_samples(fit):
    undecided(fit(Net(), collate_fn=centred, shuffle=True), "depend on what is collated with them")


class Noise(pl.Callback):
    """Zeroes the trunk for the time of a step and puts it back, as quantisation-aware training does."""

    first = True

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.kept = module.trunk[0].weight.detach().clone()
        with torch.no_grad():
            module.trunk[0].weight.zero_()

    def on_train_batch_end(self, trainer, module, *_):
        with torch.no_grad():
            module.trunk[0].weight.copy_(self.kept)


def test_a_trunk_that_is_another_one_during_a_step(fit):
    undecided(fit(Net(), Noise()), "the trunk moved")


class Clamp(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        with torch.no_grad():
            module.head.weight.clamp_(-0.01, 0.01)


@pytest.mark.parametrize("rule", ["base", "certified"])
@pytest.mark.parametrize("first", [True, False])
def test_a_head_that_a_callback_moves(fit, rule, first):
    clamp = Clamp()
    clamp.first = first
    undecided(fit(Net(), clamp, rule=rule), "something moved the head between two steps")


class Kick(pl.Callback):
    """Changes the gradient of the head in one step of many."""

    def on_after_backward(self, trainer, module):
        if trainer.global_step == 11 and module.head.weight.grad is not None:
            module.head.weight.grad.add_(100.0)


@pytest.mark.parametrize("rule", ["base", "certified"])
def test_a_gradient_that_is_changed_once_at_any_step(fit, rule):
    guard = fit(Net(), Kick(), rule=rule)
    undecided(guard, "the gradient that the head gets is not that of a loss of its outputs")
    assert "bound" not in guard.history[-1]


class Decaying(torch.optim.SGD):
    """Decays the weights by a setting of another name."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - 1e-3)
        return loss


class SharpnessAware(torch.optim.Optimizer):
    """A step that fails where no parameter has a gradient."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch.stack([g.norm() for g in gradients])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)
        return loss


OPTIMIZERS = {
    "decay by another name": (lambda p: Decaying(p, lr=0.05), "moves weights whose gradient is zero"),
    "ASGD with its own decay": (
        lambda p: torch.optim.ASGD(p, lr=0.05, lambd=0.5),
        "moves weights whose gradient is zero",
    ),
    "maximize": (lambda p: torch.optim.SGD(p, lr=1e-3, maximize=True), "maximizes the loss"),
    "a closure of its own": (SharpnessAware, "a step of a copy of SharpnessAware could not be made"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_add_something_of_their_own(fit, name):
    make, said = OPTIMIZERS[name]
    undecided(fit(Net(make)), said)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop])
def test_plain_optimizers_add_nothing(fit, kind):
    assert fit(Net(lambda p: kind(p, lr=1e-3))).verdict == "certified"


def test_a_rule_that_leaves_no_gradients_is_refused_beside_an_optimizer_that_needs_them(fit):
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="SharpnessAware without any fails"):
        fit(Net(SharpnessAware), rule="certified")


class WeightDecay(pl.Callback):
    """A schedule of weight decay that begins late."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 4:
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1


def test_weight_decay_that_is_set_later(fit):
    undecided(fit(Net(), WeightDecay()), "weight decay on the head")


class Stop(pl.Callback):
    """Moves the trunk and interrupts the run."""

    first = True

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 9:
            with torch.no_grad():
                module.trunk[0].weight.zero_()
            raise KeyboardInterrupt


def test_a_run_that_is_interrupted_after_the_trunk_moved(fit):
    guard = ExpressivityGuard(switch_at=SWITCH)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Net(), Stop(), guard=guard)
    undecided(guard, "the trunk moved")


OTHER_DATA = {
    "zeros": lambda: TensorDataset(torch.zeros(SAMPLES, 4), table().tensors[1]),
    "more samples": lambda: table(SAMPLES + 8),
    "the same": table,
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_a_run_that_resumes_with_other_data(make_trainer, tmp_path, name):
    make_trainer([ExpressivityGuard(switch_at=SWITCH)], max_epochs=4, checkpoint=True).fit(
        Net(), DataLoader(table(), 8)
    )
    guard = ExpressivityGuard(switch_at=SWITCH)
    loader = DataLoader(OTHER_DATA[name](), 8)
    make_trainer([guard], max_epochs=6).fit(Net(), loader, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    if name == "the same":
        assert (guard.verdict, guard.caveats) == ("certified", [])
    else:
        undecided(guard, "the training set is another one than that of the certificate")


def test_a_run_that_resumes_with_another_activation(make_trainer, tmp_path):
    make_trainer([ExpressivityGuard(switch_at=SWITCH)], max_epochs=4, checkpoint=True).fit(
        Net(), DataLoader(table(), 8)
    )
    guard, module = ExpressivityGuard(switch_at=SWITCH), Net()
    module.trunk[1] = nn.Identity()
    make_trainer([guard], max_epochs=6).fit(
        module, DataLoader(table(), 8), ckpt_path=tmp_path / "checkpoints" / "last.ckpt"
    )
    undecided(guard, "the trunk computes other features")


class Flooded(nn.Module):
    """Keeps the loss above a level; only near the solution does it differ from a cross-entropy."""

    def forward(self, u, y):
        return (F.cross_entropy(u, y) - 1e-3).abs() + 1e-3


def test_a_solved_head_is_compared_with_the_step_where_no_step_was_seen(fit):
    module = Net()
    flooded = Flooded()
    module.training_step = lambda batch, batch_idx: flooded(module(batch[0]), batch[1])
    undecided(fit(module, rule="solve"), "minimises something else")


class Chameleon(nn.Module):
    """Computes one feature in float32 and all of them in float64."""

    def forward(self, h):
        return h if h.dtype == torch.float64 else h[:, :1].expand_as(h)


@pytest.mark.parametrize("rule", ["base", "certified", "solve"])
def test_a_network_that_is_another_one_in_float64(fit, rule):
    module = Net()
    module.trunk.append(Chameleon())
    guard = fit(module, rule=rule)  # the features in float64 say nothing of those in float32
    assert guard.verdict != "certified"
    assert guard.certificate is None or guard.certificate.verdict == "undecided"


def test_an_outlier_that_leaves_the_wide_layer_is_found_among_all_samples(fit):
    """Only the last samples, beyond the first batch, take another way."""

    class Clipped(Net):
        def forward(self, x):
            h = self.trunk(x)
            bad = x.norm(dim=1) > 50
            return self.head(torch.where(bad[:, None], torch.zeros_like(h), h) if bool(bad.any()) else h)

    data = table()
    data.tensors[0][-2:] *= 1000.0
    guard = fit(Clipped(), data=data, guard=ExpressivityGuard(switch_at=SWITCH, method="distinct"))
    assert guard.verdict != "certified"
    assert guard.certificate is None or guard.certificate.verdict != "certified"


def test_large_targets_that_hardly_differ_are_not_reached_by_a_narrow_head(make_trainer):
    """The least squares residual, by QR in float64, is far from 0 although it is 1e-10 of the targets."""
    torch.manual_seed(0)
    x, y = torch.randn(SAMPLES, 4, dtype=torch.float64), 1e9 + torch.randn(SAMPLES, 1, dtype=torch.float64)
    module = Net()
    module.trunk, module.head, module.loss_fn = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 1), nn.MSELoss()
    module.optimizer = lambda p: torch.optim.SGD(p, lr=1e-12)
    guard = ExpressivityGuard(switch_at=2, method="alignment")
    make_trainer([guard], max_epochs=4, precision="64-true").fit(module, DataLoader(TensorDataset(x, y), SAMPLES))
    h = torch.cat([module.trunk(x).detach(), torch.ones(SAMPLES, 1)], 1)
    q, _ = torch.linalg.qr(h)
    assert float((y - y.mean() - q @ (q.T @ (y - y.mean()))).square().mean()) > 0.1
    assert guard.verdict != "certified"
