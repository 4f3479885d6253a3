"""What the backward pass and the optimizer's calls of the training step do beside the loss that the step returns."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard
from tests.callbacks.guard.certify.nets import LOSSES, SWITCH, Net, table, undecided


class Adding(Net):
    """``backward`` adds a term to the loss from the fifth epoch on."""

    def training_step(self, batch, batch_idx):
        self.u = self(batch[0])
        return self.loss(self.u, batch[1])

    def backward(self, loss):
        (loss + 0.1 * self.u.square().mean() * self.late).backward()


class Before(pl.Callback):
    """Differentiates a term of its own before the loss, from the fifth epoch on."""

    def on_before_backward(self, trainer, module, loss):
        if module.late:
            (0.1 * module.u.square().mean()).backward(retain_graph=True)


class Kept(Net):
    def training_step(self, batch, batch_idx):
        self.u = self(batch[0])
        return self.loss(self.u, batch[1])


@pytest.mark.parametrize("loss_fn", LOSSES, ids=["functional", "module"])
@pytest.mark.parametrize(("module", "others"), [(Adding, []), (Kept, [Before()])], ids=["module", "callback"])
def test_a_backward_pass_that_adds_a_term_late(fit, module, others, loss_fn):
    assert (guard := fit(module(loss_fn), *others)).phase == 2
    assert guard.verdict == "undecided"


def test_a_backward_of_its_own_that_adds_nothing_is_certified(fit):
    class Plain(Net):
        def backward(self, loss):
            loss.backward()

    guard = fit(Plain(nn.CrossEntropyLoss()))
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


class Without(torch.autograd.Function):
    """The identity, whose backward pass leaves out some samples."""

    @staticmethod
    def forward(ctx, u, kept):
        ctx.save_for_backward(kept)
        return u.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0][:, None], None


@pytest.mark.parametrize(
    ("late", "loss_fn"), [(False, None), (False, nn.CrossEntropyLoss()), (True, nn.CrossEntropyLoss())]
)
def test_samples_without_a_gradient(fit, loss_fn, late):
    """Late in the run this is seen where ``loss_fn`` is known."""

    class Partial(Net):
        def training_step(self, batch, batch_idx):
            kept = (batch[1] != 1) | (late and self.current_epoch != 2)
            return self.loss(Without.apply(self(batch[0]), kept), batch[1])

    x, y = table().tensors
    order = (y[:, None] == torch.tensor([0, 1, 2])).float().argmax(1).argsort(stable=True)  # 1 in the middle
    assert (guard := fit(Partial(loss_fn), data=TensorDataset(x[order], y[order]))).phase == 2
    assert guard.verdict == "undecided"


class Lazy(SGD):
    """Decays in one step of thirty."""

    count = 0

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    number = self.state[each]["n"] = self.state[each].get("n", 0) + 1
                    if number % 30 == 25:
                        each.data.mul_(0.9)
        return loss


def test_an_optimizer_that_decays_in_one_step_of_thirty(fit):
    class Own(Net):
        def configure_optimizers(self):
            return Lazy(self.parameters(), lr=0.05)

    guard = fit(Own(nn.CrossEntropyLoss()), max_epochs=12)
    undecided(guard, "depend on the weights")


class Reevaluated(Net):
    """Only the second and third evaluation of a step have a penalty."""

    penalty = 0.05

    def on_train_batch_start(self, batch, batch_idx):
        self.evaluations = 0

    def training_step(self, batch, batch_idx):
        self.evaluations += 1
        loss = self.loss(self(batch[0]), batch[1])
        if self.evaluations > 1 and self.global_step % 5 == 3:
            loss = loss + self.penalty * self.head.weight.square().sum()
        return loss

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("penalty", [0.05, 0.0])
def test_every_evaluation_of_lbfgs_is_looked_at(fit, penalty):
    module = Reevaluated()
    module.penalty = penalty
    assert (guard := fit(module)).phase == 2
    assert guard.verdict == ("undecided" if penalty else "certified"), (guard.why, guard.caveats)


class NormLogger(Net):
    def on_before_optimizer_step(self, optimizer):
        norms = torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None])
        self.log("norm", norms.norm())


@pytest.mark.parametrize("rule", ["base", "certified"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_gradients_are_there_for_hooks_before_the_step(fit, rule, clip):
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule=rule)
    fit(NormLogger(nn.CrossEntropyLoss()), guard=guard, gradient_clip_val=clip)
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


class Saliency(pl.Callback):
    """Calls the network with gradients between the batches of a step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            torch.autograd.grad(module(x).sum(), x)


@pytest.mark.parametrize("first", [True, False])
def test_calls_between_the_batches_of_a_step_are_not_part_of_it(make_trainer, first):
    guard, other = ExpressivityGuard(switch_at=2), Saliency()
    trainer = make_trainer([other, guard] if first else [guard, other], max_epochs=6, accumulate_grad_batches=3)
    trainer.fit(Net(nn.CrossEntropyLoss()), DataLoader(table(), 8))
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])
