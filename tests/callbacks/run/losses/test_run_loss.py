"""The loss of the training step: observed where it is one of torch's, unknown with the reason where it is not, given where it is given."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ConvergenceCriteria, KernelStability, LambdaMin, Probe

N, C = 8, 3


class Look(pl.Callback):
    def __init__(self, monitor):
        self.monitor = monitor

    def on_train_batch_start(self, *_):
        self.network = self.monitor._kernel.run_network


class Module(pl.LightningModule):
    """A linear network, a loss that is any function of (module, outputs, batch), and a learning rate of 0."""

    def __init__(self, loss, read=lambda batch: batch[0], outputs=C):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.loss, self.read = nn.Linear(4, outputs), loss, read

    def training_step(self, batch, batch_idx):
        return self.loss(self, self.net(self.read(batch)), batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X, REAL, CLASSES = numbers(N, 4), numbers(N, C), torch.arange(N) % C
BITS = (numbers(N, C) > 0).float()


@pytest.fixture
def observed(make_trainer):
    def fit(module, samples, monitor=None):
        monitor = monitor or KernelStability(N, every_n_steps=1)
        look = Look(monitor)
        make_trainer([monitor, look], max_epochs=1).fit(module, DataLoader(samples, batch_size=N))
        return look.network.loss, monitor.measured

    return fit


def pairs(targets):
    return list(zip(X, targets, strict=True))


FUNCTIONAL = {
    "mse": (F.mse_loss, REAL, nn.MSELoss, "mean"),
    "cross entropy": (F.cross_entropy, CLASSES, nn.CrossEntropyLoss, "mean"),
    "cross entropy of shares": (F.cross_entropy, REAL.softmax(1), nn.CrossEntropyLoss, "mean"),
    "bce": (F.binary_cross_entropy_with_logits, BITS, nn.BCEWithLogitsLoss, "mean"),
    "l1": (F.l1_loss, REAL, nn.L1Loss, "mean"),
    "smooth l1": (F.smooth_l1_loss, REAL, nn.SmoothL1Loss, "mean"),
    "nll of log_softmax": (lambda u, y: F.nll_loss(u.log_softmax(1), y), CLASSES, nn.CrossEntropyLoss, "mean"),
    "by hand": (lambda u, y: (u - y).pow(2).mean(), REAL, nn.MSELoss, "mean"),
    "mse, sum": (lambda u, y: F.mse_loss(u, y, reduction="sum"), REAL, nn.MSELoss, "sum"),
    "cross entropy, sum": (lambda u, y: F.cross_entropy(u, y, reduction="sum"), CLASSES, nn.CrossEntropyLoss, "sum"),
    "bce, sum": (
        lambda u, y: F.binary_cross_entropy_with_logits(u, y, reduction="sum"), BITS, nn.BCEWithLogitsLoss, "sum"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_a_loss_that_is_a_function_is_observed_with_its_targets(observed, name):
    fn, targets, kind, reduction = FUNCTIONAL[name]
    module = Module(lambda module, u, batch: fn(u, batch[1]))
    loss, said = observed(module, pairs(targets))
    assert loss.source == "observed"
    assert (type(loss.fn), loss.fn.reduction) == (kind, reduction)
    assert torch.equal(loss.targets, targets)
    u = module.net(X)
    assert float(loss.fn(u, loss.targets)) == pytest.approx(float(fn(u, targets)), rel=1e-5)
    assert said.endswith("(observed)")


def test_a_network_that_ends_in_log_softmax_has_its_own_loss(observed):
    module = Module(lambda module, u, batch: F.nll_loss(u, batch[1]))
    module.net = nn.Sequential(nn.Linear(4, C), nn.LogSoftmax(1))
    loss, _ = observed(module, pairs(CLASSES))
    assert (loss.source, type(loss.fn)) == ("observed", nn.NLLLoss)


ANYWHERE = {
    "second of three": ([(x, y, x + 1) for x, y in pairs(REAL)], lambda b: b[0], lambda b: b[1]),
    "last of three": ([(x, x + 1, y) for x, y in pairs(REAL)], lambda b: b[0], lambda b: b[2]),
    "first": ([(y, x) for x, y in pairs(REAL)], lambda b: b[1], lambda b: b[0]),
    "under an odd name": ([{"feats": x, "y": x, "truth": y} for x, y in pairs(REAL)], lambda b: b["feats"], lambda b: b["truth"]),
    "deep inside": ([(x, {"meta": {"id": x[0], "gold": y}}) for x, y in pairs(REAL)], lambda b: b[0], lambda b: b[1]["meta"]["gold"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ANYWHERE)
def test_the_targets_may_be_any_tensor_of_the_batch(observed, name):
    samples, read, target = ANYWHERE[name]
    loss, _ = observed(Module(lambda module, u, batch: F.mse_loss(u, target(batch)), read), samples)
    assert loss.source == "observed"
    assert torch.equal(loss.targets, REAL)


def test_the_input_itself_may_be_the_target(observed):
    module = Module(lambda module, u, x: F.mse_loss(u, x), read=lambda x: x, outputs=4)
    loss, _ = observed(module, list(X))
    assert loss.source == "observed"
    assert torch.equal(loss.targets, X)


def mse(u, batch):
    return F.mse_loss(u, batch[1])


BY_CHANCE = "with random numbers"
OTHERS = {
    "a penalty": (lambda m, u, b: mse(u, b) + 1e-3 * m.net.weight.square().sum(), "net.weight"),
    "a small penalty": (lambda m, u, b: mse(u, b) + 1e-9 * m.net.bias.abs().sum(), "net.bias"),
    "samples that are coupled": (lambda m, u, b: mse(u - u.mean(0), b), "couples the samples"),
    "the hardest samples": (lambda m, u, b: (u - b[1]).square().mean(1).topk(2).values.mean(), "couples the samples"),
    "n x n numbers": (lambda m, u, b: F.mse_loss(u[:, :1], b[1][:, 0]), "rest of the batch"),
    "some of the samples": (lambda m, u, b: mse(u[:2], [b[0][:2], b[1][:2]]), "rest of the batch"),
    "a weight for each place in the batch": (
        lambda m, u, b: ((u - b[1]).square().mean(1) * torch.arange(1.0, len(u) + 1)).mean(), "rest of the batch",
    ),
    "a cap": (lambda m, u, b: mse(u, b).clamp(max=50.0), "couples the samples"),
    "no gradient by the outputs": (lambda m, u, b: mse(u.detach(), b) + u.sum() * 0, "not that of its value"),
    "a gradient of its own": (
        lambda m, u, b: mse(u, b) + (r := 0.3 * u.square().mean()) - r.detach(), "not that of its value",
    ),
    "noisy targets": (lambda m, u, b: F.mse_loss(u, b[1] + 0.1 * torch.randn_like(u)), BY_CHANCE),
    "one of two by torch": (lambda m, u, b: (F.mse_loss if torch.rand(()) < 0.4 else F.l1_loss)(u, b[1]), BY_CHANCE),
    "one of two by Python": (lambda m, u, b: (F.mse_loss if random.random() < 0.4 else F.l1_loss)(u, b[1]), BY_CHANCE),
    "one of two by NumPy": (
        lambda m, u, b: (F.mse_loss if np.random.rand() < 0.6 else F.l1_loss)(u, b[1]), BY_CHANCE,  # noqa: NPY002
    ),
    "a factor that grows with the steps": (lambda m, u, b: (1 + m.global_step) * mse(u, b), "from one step or epoch"),
    "a factor that grows with the epochs": (lambda m, u, b: (1 + m.current_epoch) * mse(u, b), "from one step or epoch"),
    "two networks, one of them not seen": (
        lambda m, u, b: mse(u, b) + F.linear(b[0], m.net.weight).square().mean(), "net.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_loss_is_unknown_and_the_reason_is_said(observed, name):
    fn, reason = OTHERS[name]
    loss, said = observed(Module(fn), pairs(REAL))
    assert (loss.source, loss.fn) == ("unknown", None)
    assert reason in loss.reason
    assert f"the loss is unknown: {loss.reason}" in said


IN_TRAINING = {
    "smoothed labels": lambda m, u, b: F.cross_entropy(u, b[1], label_smoothing=0.1 if m.training else 0.0),
    "another loss": lambda m, u, b: F.multi_margin_loss(u, b[1]) if m.training else F.cross_entropy(u, b[1]),
    "dropout of the outputs": lambda m, u, b: F.cross_entropy(F.dropout(u, 0.3, m.training), b[1]),
    "mixed labels, by chance": lambda m, u, b: (
        F.cross_entropy(u, b[1].flip(0)) if m.training and random.random() < 0.4 else F.cross_entropy(u, b[1])
    ),
    "a part's mode": lambda m, u, b: F.cross_entropy(u, b[1]) * (2 if m.net.training else 1),
}


WITHOUT_GRADIENT = {
    "a norm of the weights": lambda m, u, b: F.cross_entropy(u, b[1]) + m.net.weight.detach().square().sum(),
    "the same outputs as targets": lambda m, u, b: F.mse_loss(u, m.net(b[0]).detach() + 1.0),
    "weights of the samples": lambda m, u, b: (
        F.cross_entropy(u, b[1], reduction="none") * m.net.forward(b[0]).detach().square().sum(1)
    ).mean(),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_loss_that_takes_something_from_the_weights_without_a_gradient_is_unknown(observed, name):
    loss, said = observed(Module(WITHOUT_GRADIENT[name]), pairs(CLASSES))
    assert loss.source == "unknown"
    assert "changes with the weights" in said


class InSomeBatches(Module):
    """Has another loss in some batches of an epoch, or after some steps: a function of (module, number of the batch)."""

    def __init__(self, when):
        super().__init__(lambda m, u, b: F.cross_entropy(u, b[1]))
        self.when, self.count = when, 0

    def training_step(self, batch, batch_idx):
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        return loss + self.net.weight.square().sum() if self.when(self, batch_idx) else loss


PERIODIC = {
    "every fourth batch": lambda m, k: k % 4 == 3,
    "the last batch": lambda m, k: k == 7,
    "after five steps": lambda m, k: m.global_step >= 5,
    "after five calls": lambda m, k: m.count > 5,
}


@pytest.mark.parametrize("name", PERIODIC)
def test_a_loss_that_is_another_one_in_some_batches_is_unknown(make_trainer, name):
    monitor = KernelStability(N, every_n_steps=1)
    look, module = Look(monitor), InSomeBatches(PERIODIC[name])
    make_trainer([monitor, look], max_epochs=1).fit(module, DataLoader(pairs(CLASSES), batch_size=1))
    assert look.network.loss.source == "unknown"
    assert "from one step or epoch to the next" in monitor.measured


def test_a_step_is_not_told_of_batches_that_the_epoch_has_not(observed):
    """A loss that looks up a number for each batch is observed."""
    table = [1.0, 1.0]  # the next one is always tried

    class Looked(Module):
        def training_step(self, batch, batch_idx):
            return table[batch_idx] * super().training_step(batch, batch_idx)

    loss, _ = observed(Looked(lambda m, u, b: F.cross_entropy(u, b[1])), pairs(CLASSES))
    assert loss.source == "observed"


RARE = torch.zeros(24, dtype=torch.long).index_fill(0, torch.tensor([10, 11]), 2)
ONES = torch.ones(24).index_fill(0, torch.tensor([11]), 5.0)
ELSEWHERE = {
    "weights of the classes": lambda m, u, b: F.cross_entropy(u, b[1], weight=torch.tensor([1.0, 1.0, 9.0])),
    "an ignored class": lambda m, u, b: F.cross_entropy(u, b[1], ignore_index=2),
    "weights of the samples": lambda m, u, b: (F.cross_entropy(u, b[1], reduction="none") * b[2]).mean(),
    "a class of its own": lambda m, u, b: torch.where(b[1] == 2, u.square().sum(1), F.cross_entropy(u, b[1], reduction="none")).mean(),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_loss_that_differs_for_samples_beyond_the_first_ones_is_not_called_a_usual_one(make_trainer, name):
    x = numbers(24, 4)
    module = Module(ELSEWHERE[name])
    monitor = KernelStability(Probe(24), every_n_steps=1)
    look = Look(monitor)
    samples = list(zip(x, RARE, ONES, strict=True))
    make_trainer([monitor, look], max_epochs=1).fit(module, DataLoader(samples, batch_size=8))
    loss = look.network.loss
    assert loss.own is not None
    u, batch = module.net(x), (x, RARE, ONES)
    assert float(loss.fn(u, torch.arange(24))) == pytest.approx(float(module.loss(module, u, batch)), rel=1e-5)


def test_targets_are_those_with_which_the_loss_agrees_on_all_samples(make_trainer):
    x, wrong = numbers(24, 4), numbers(24, C)
    right = wrong.clone()
    right[11] += 1.0
    monitor = KernelStability(Probe(24), every_n_steps=1)
    look = Look(monitor)
    module = Module(lambda m, u, b: F.mse_loss(u, b[2]))
    make_trainer([monitor, look], max_epochs=1).fit(module, DataLoader(list(zip(x, wrong, right, strict=True)), 8))
    assert look.network.loss.source == "observed"
    assert torch.equal(look.network.loss.targets, right)


@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_loss_that_is_another_one_in_training_is_unknown(observed, name):
    assert observed(Module(IN_TRAINING[name]), pairs(CLASSES))[0].source == "unknown"


def test_an_auxiliary_output_of_training_is_no_function_of_the_outputs_alone(observed):
    class Auxiliary(Module):
        def forward(self, x):
            u = self.net(x)
            return (u, u.square()) if self.training else (u, None)

        def training_step(self, batch, batch_idx):
            u, more = self(batch[0])
            loss = F.cross_entropy(u, batch[1])
            return loss if more is None else loss + 0.3 * F.cross_entropy(more, batch[1])

    assert observed(Auxiliary(None), pairs(CLASSES))[0].source == "unknown"


def test_dropout_and_batch_norm_inside_the_network_are_no_obstacle(observed):
    module = Module(lambda module, u, batch: F.cross_entropy(u, batch[1]))
    module.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, C))
    assert observed(module, pairs(CLASSES))[0].source == "observed"


def test_random_numbers_that_the_loss_does_not_depend_on_are_no_obstacle(observed):
    def loss(module, u, batch):
        assert random.random() + np.random.rand() + float(torch.rand(())) >= 0  # noqa: NPY002
        return mse(u, batch)

    assert observed(Module(loss), pairs(REAL))[0].source == "observed"


def test_noise_on_the_inputs_leaves_the_loss_what_it_is(observed):
    module = Module(lambda module, u, batch: mse(u, batch), read=lambda batch: batch[0] + torch.randn_like(batch[0]))
    assert observed(module, pairs(REAL))[0].source == "observed"


def test_a_loss_module_that_is_kept_for_a_log_is_not_taken_for_the_loss(observed):
    module = Module(lambda module, u, batch: F.l1_loss(u, batch[1]) + 0 * module.shown(u, batch[1]).detach())
    module.shown = nn.MSELoss()
    assert type(observed(module, pairs(REAL))[0].fn) is nn.L1Loss
    centred = Module(lambda module, u, batch: mse(u - u.mean(0), batch) + 0 * module.shown(u, batch[1]).detach())
    centred.shown = nn.MSELoss()
    loss, _ = observed(centred, pairs(REAL))
    assert loss.source == "unknown"
    assert "of MSELoss it differs" in loss.reason


def test_a_loss_module_with_settings_of_its_own_is_observed_with_them(observed):
    module = Module(lambda module, u, batch: module.smoothed(u, batch[1]))
    module.smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss, _ = observed(module, pairs(CLASSES))
    assert (loss.source, loss.fn.label_smoothing) == ("observed", 0.1)


def test_a_loss_that_is_given_wins(observed):
    module = Module(lambda module, u, batch: 3 * mse(u, batch))
    monitor = LambdaMin(N, every_n_steps=1, loss_fn=nn.MSELoss())
    assert observed(module, pairs(REAL), monitor)[1].endswith("the loss is MSELoss (given)")
    assert observed(Module(lambda m, u, b: mse(u, b)), pairs(REAL), LambdaMin(N, loss_fn=nn.L1Loss(), every_n_steps=1))[
        1
    ].endswith("the loss is L1Loss (given)")


def test_each_monitor_says_which_loss_it_uses(make_trainer):
    plain = LambdaMin(N, every_n_steps=1)
    given = ConvergenceCriteria(probe=N, every_n_steps=1, loss_fn=nn.L1Loss())
    module = Module(lambda module, u, batch: mse(u, batch))
    make_trainer([plain, given], max_epochs=1).fit(module, DataLoader(pairs(REAL), batch_size=N))
    assert plain.measured.endswith("the loss is MSELoss (observed)")
    assert given.measured.endswith("the loss is L1Loss (given)")


class Keywords(Module):
    def forward(self, *, x, mask=None):
        return self.net(x * mask)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(x=batch[0], mask=torch.ones(1)), batch[1])


class Parts(Module):
    """Returns its outputs as a part of a structure."""

    def forward(self, batch):
        u = self.net(batch[0])
        return {"more": [u.detach(), (batch[0], u)]}

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch)["more"][1][1], batch[1])


class Inside(Parts):
    """Computes the loss in its forward."""

    def forward(self, batch):
        logits = self.net(batch[0])
        return {"loss": F.mse_loss(logits, batch[1]), "logits": logits}

    def training_step(self, batch, batch_idx):
        return self(batch)


class Twice(Parts):
    """Its last layer is called before, too: the outputs can be replaced in the result only."""

    def forward(self, batch):
        u = self.net(self.net(batch[0]))
        return u, u.detach()

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch)[0], batch[1])


class Pixels(Module):
    """A class for each of several places."""

    def training_step(self, batch, batch_idx):
        image = self.net(batch[0])[:, :, None].expand(-1, -1, 2)
        return F.cross_entropy(self.last(image), batch[1])


@pytest.mark.parametrize("kind", [Keywords, Parts, Inside])
def test_the_loss_is_observed_however_the_outputs_are_returned(observed, kind):
    loss, _ = observed(kind(None), pairs(REAL))
    assert (loss.source, type(loss.fn)) == ("observed", nn.MSELoss)


def test_the_loss_of_a_layer_that_is_called_twice_is_observed(observed):
    loss, _ = observed(Twice(None, outputs=4), list(zip(X, X + 1, strict=True)))
    assert (loss.source, type(loss.fn)) == ("observed", nn.MSELoss)


def test_the_network_gives_the_outputs_in_the_shape_that_the_loss_takes(make_trainer):
    module = Pixels(None)
    module.last = nn.Conv1d(C, C, 1)
    monitor = LambdaMin(N, every_n_steps=1)
    look = Look(monitor)
    classes = torch.stack([CLASSES, CLASSES.flip(0)], 1)
    make_trainer([monitor, look], max_epochs=1).fit(module, DataLoader(pairs(classes), batch_size=N))
    network, loss = look.network, look.network.loss
    assert (loss.source, type(loss.fn)) == ("observed", nn.CrossEntropyLoss)
    u = module.last(module.net(X)[:, :, None].expand(-1, -1, 2))
    assert network.observed.outputs[0].rest == (C, 2)
    assert float(loss.fn(u, loss.targets)) == pytest.approx(float(F.cross_entropy(u, classes)))


def test_the_loss_of_another_network_than_the_steps_is_unknown(observed):
    other = Probe(N, input_fn=lambda batch: batch[0], forward_fn=lambda module, x: module.net(x).square())
    loss, _ = observed(Module(lambda m, u, b: mse(u, b)), pairs(REAL), KernelStability(other, every_n_steps=1))
    assert loss.source == "unknown"
    assert "other outputs" in loss.reason
    same = Probe(N, input_fn=lambda batch: batch[0], forward_fn=lambda module, x: module.net(x))
    loss, _ = observed(Module(lambda m, u, b: mse(u, b)), pairs(REAL), KernelStability(same, every_n_steps=1))
    assert loss.source == "observed"
