"""Every run that the guard refuses, or leaves uncertified, for the way it calls its network; and what the message says, done."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, StackDataset, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard
from tests.callbacks.guard.any_step import TOKENS, WIDTH, Bare, Base, Tokens, X, Y, table

TABLE = TensorDataset(X, Y)


@pytest.fixture
def run(make_trainer):
    def go(module, loader, guard=None, **options):
        guard = guard or ExpressivityGuard(switch_at=0.5)
        make_trainer([guard], **{"max_epochs": 4} | options).fit(module, loader)
        return guard

    return go


@pytest.fixture
def refused(run):
    def go(module, loader, says, guard=None, **options):
        with pytest.raises(MisconfigurationException) as error:
            run(module, loader, guard, **options)
        assert "ExpressivityGuard" in str(error.value)
        assert re.search(says, str(error.value)), str(error.value)
        return str(error.value)

    return go


def certified(guard):
    assert (guard.phase, guard.verdict, guard.caveats) == (2, "certified", []), (guard.why, guard.caveats)


class Script(Base):
    def __init__(self, part="trunk"):
        super().__init__()
        setattr(self, part, torch.jit.script(getattr(self, part)))


class ScriptedNet(LightningModule):
    def __init__(self):
        super().__init__()
        base = Base()
        self.net = torch.jit.script(nn.Sequential(base.trunk, base.head))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    configure_optimizers = Base.configure_optimizers


@pytest.mark.parametrize(("module", "name"), [(lambda: Script("head"), "head"), (ScriptedNet, "net")])
def test_a_scripted_head(run, refused, module, name):
    refused(
        module(),
        table()(),
        f"'{name}' is scripted, so .*script the trunk alone, and leave the last nn.Linear out of it",
    )
    certified(run(Script("trunk"), table()()))


class ScriptedAfterTheHead(Base):
    def __init__(self):
        super().__init__()
        self.after = torch.jit.script(nn.Sequential(nn.Linear(1, 1)))

    def forward(self, x):
        return self.after(super().forward(x))


def test_a_scripted_layer_after_the_head_counts_as_a_layer(refused):
    says = "'head' is followed by \"after\", which has parameters"
    refused(ScriptedAfterTheHead(), table()(), says, ExpressivityGuard(switch_at=0.5, head="head"))


class ScriptedCast(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x):
        return self.trunk(x).float().to(x.dtype)


def test_a_cast_inside_scripted_code_is_seen(run):
    module = Base()
    module.trunk = torch.jit.script(ScriptedCast(module.trunk))
    guard = run(module, table()())
    assert guard.verdict == "undecided"
    assert "computes in torch.float32" in guard.reason


class Compiled(LightningModule):
    def __init__(self):
        super().__init__()
        base = Base()
        self.net = torch.compile(nn.Sequential(base.trunk, base.head), backend="eager")

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    configure_optimizers = Base.configure_optimizers


class CompiledTrunk(Base):
    def __init__(self):
        super().__init__()
        self.trunk = torch.compile(self.trunk, backend="eager")


@pytest.mark.parametrize("module", [Compiled, lambda: torch.compile(Base(), backend="eager")], ids=["net", "module"])
def test_a_compiled_head(run, module):
    guard = run(module(), table()())
    assert guard.verdict == "undecided"
    said = [check.said for check in guard.checks if not check.held]
    assert any(
        "it is in compiled code; compile the rest without it, as in self.trunk = torch.compile(self.trunk)" in each
        for each in said
    )
    certified(run(CompiledTrunk(), table()()))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(TABLE))


class Batches(IterableDataset):
    def __iter__(self):
        return iter([(X[k : k + 5], Y[k : k + 5]) for k in range(0, 20, 5)])


def test_a_stream_of_samples(run, refused):
    refused(Base(), DataLoader(Stream(), batch_size=5), re.escape("pass DataLoader(list(dataset), batch_size=5)"))
    dataset = Stream()
    certified(run(Base(), DataLoader(list(dataset), batch_size=5)))


def test_a_stream_of_batches(run, refused):
    line = "DataLoader([sample for batch in dataset for sample in zip(*batch)], batch_size=...)"
    refused(Base(), DataLoader(Batches(), batch_size=None), re.escape(line))
    dataset = Batches()
    certified(
        run(Base(), DataLoader([sample for batch in dataset for sample in zip(*batch, strict=True)], batch_size=5))
    )


def test_a_list_of_batches(run, refused):
    loader = list(Batches())
    refused(
        Base(), loader, re.escape("DataLoader([sample for batch in loader for sample in zip(*batch)], batch_size=...)")
    )
    certified(
        run(Base(), DataLoader([sample for batch in loader for sample in zip(*batch, strict=True)], batch_size=5))
    )


class TwoLoaders(Base):
    def training_step(self, batch, batch_idx):
        (x, y), (z, w) = batch.values() if isinstance(batch, dict) else batch
        return F.mse_loss(self(torch.cat([x, z], 1)), y + w)


@pytest.mark.parametrize("named", [True, False])
def test_several_loaders(run, refused, named):
    half, other = TensorDataset(X[:, :4], Y), TensorDataset(X[:, 4:], Y)
    loaders = {"a": DataLoader(half, batch_size=5), "b": DataLoader(other, batch_size=5)}
    says = "StackDataset(a=a_set, b=b_set)" if named else "StackDataset(set_0, set_1)"
    refused(TwoLoaders(), loaders if named else list(loaders.values()), re.escape(says))
    stacked = StackDataset(a=half, b=other) if named else StackDataset(half, other)
    certified(run(TwoLoaders(), DataLoader(stacked, batch_size=5)))


class Twice(Base):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]) + self(batch[0].flip(1)), batch[1])


class Once(Bare):
    def training_step(self, batch, batch_idx):
        h = torch.stack([self.trunk(batch[0]), self.trunk(batch[0].flip(1))], 1)
        return F.mse_loss(self.head(h).sum(1), batch[1])


class InALoop(Base):
    def forward(self, x):
        return sum(self.head(self.trunk(x + k)) for k in range(3))


class AfterTheLoop(Base):
    def forward(self, x):
        return self.head(torch.stack([self.trunk(x + k) for k in range(2)], 1))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]).sum(1), batch[1])


@pytest.mark.parametrize(("module", "cured"), [(Twice, Once), (InALoop, AfterTheLoop)])
def test_a_head_that_is_called_several_times(run, refused, module, cured):
    says = r"'head' was called \d times .*call it once, on torch.stack\(\[...\], 1\) of what enters it"
    refused(module(), table()(), says)
    certified(run(cured(), table()()))


class TwoHeads(Base):
    def __init__(self):
        super().__init__()
        self.one, self.two = self.head, nn.Linear(WIDTH, 1)
        del self.head

    def training_step(self, batch, batch_idx):
        h = self.trunk(batch[0])
        return F.mse_loss(self.one(h), batch[1]) + F.l1_loss(self.two(h), batch[1])


class OneHead(Base):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 2)

    def training_step(self, batch, batch_idx):
        a, b = self.head(self.trunk(batch[0])).split([1, 1], 1)
        return F.mse_loss(a, batch[1]) + F.l1_loss(b, batch[1])


def test_two_heads(run, refused):
    says = re.escape(
        "the loss depends on self.one(...) and self.two(...), and phase 2 trains one layer; make one nn.Linear of them, and"
    )
    refused(TwoHeads(), table()(), says)
    certified(run(OneHead(), table()()))


class ByItsForward(Bare):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.head.forward(self.trunk(batch[0])), batch[1])


class ByAFunction(Bare):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(F.linear(self.trunk(batch[0]), self.head.weight, self.head.bias), batch[1])


@pytest.mark.parametrize("module", [ByItsForward, ByAFunction])
def test_a_head_that_is_not_called(run, refused, module):
    refused(module(), table()(), re.escape("end the network in a call of a linear layer, such as self.head(h)"))
    certified(run(Base(), table()()))


class FiveAtATime(Bare):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.head(self.trunk(batch["q"])), batch["a"].view(5, 1))


def test_a_step_that_cannot_be_observed_names_a_call_that_works(run, refused):
    loader = DataLoader([{"a": y, "q": x} for x, y in TABLE], batch_size=5)
    said = refused(FiveAtATime(), loader, "could not be observed .*runs on 5 samples, but not on 4 of them")
    line = said.rpartition("say how it is called, in this way: ")[2]
    called = "input_fn=lambda batch: batch['q'], forward_fn=lambda module, x: module.head(module.trunk(x))"
    assert line == f"ExpressivityGuard({called})"
    guard = run(FiveAtATime(), loader, eval(line.replace("Guard(", "Guard(switch_at=8, ")))
    assert (guard.phase, guard.head_name) == (2, "head")
    assert guard.verdict == "undecided"  # whether samples are coupled cannot be tried on fewer


class Lazy(Base):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, WIDTH), nn.Tanh())


def test_lazy_layers(run, refused):
    loader = table()()
    refused(Lazy(), loader, re.escape("let one batch pass before the fit: module.training_step(next(iter(loader)), 0)"))
    module = Lazy()
    module.training_step(next(iter(loader)), 0)
    certified(run(module, loader))


class Penalty(Base):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-3 * self.trunk[0].weight.square().sum()


class Scaled(Base):
    def training_step(self, batch, batch_idx):
        return 0.5 * (self(batch[0]) - batch[1]).square().mean()


def half_of_the_square(u, y):
    return 0.5 * (u - y).square().mean()


def test_an_unknown_loss_and_the_one_that_is_given(run, refused):
    says = r"step_rule='certified': the loss is unknown: .*; pass loss_fn="
    refused(Penalty(), table(batch_size=20)(), says, ExpressivityGuard(switch_at=0.5, step_rule="certified"))
    with pytest.warns(
        UserWarning,
        match=r"the loss is unknown: .* the gap is not logged; pass ExpressivityGuard\(loss_fn=nn.MSELoss\(\)\)",
    ):
        guard = run(Penalty(), table()())
    assert guard.verdict == "undecided"
    guard = run(Scaled(), table()(), ExpressivityGuard(switch_at=0.5, loss_fn=half_of_the_square, infimum=0.0))
    certified(guard)
    assert "(given)" in guard.measured
    assert "gap" in guard.history[-1]


class Wrong(Base):
    """Another loss among its attributes than the one that it minimises."""

    def __init__(self):
        super().__init__()
        self.loss_fn = nn.L1Loss()


class Right(Base):
    def __init__(self):
        super().__init__()
        self.loss_fn = nn.HuberLoss()

    def training_step(self, batch, batch_idx):
        return self.loss_fn(self(batch[0]), batch[1])


def test_the_loss_is_what_the_step_minimises_and_not_what_an_attribute_says(run):
    assert "the loss is MSELoss (observed)" in run(Wrong(), table()()).measured
    assert "the loss is HuberLoss (observed)" in run(Right(), table()()).measured


def test_what_the_user_says_wins(run):
    other = ExpressivityGuard(
        switch_at=0.5,
        forward_fn=lambda module, x: module(x),
        input_fn=lambda batch: batch[0],
        loss_fn=nn.MSELoss(),
        target_fn=lambda b: b[1],
    )
    guard = run(Base(), table()(), other)
    certified(guard)
    assert "given" in guard.measured
    assert guard.head_name == "head"
    wrong = ExpressivityGuard(switch_at=0.5, loss_fn=nn.L1Loss())
    guard = run(Base(), table()(), wrong)
    assert guard.verdict == "undecided"
    assert any("something else than the mean of L1Loss" in each for each in guard.caveats)


def test_another_target_than_the_step_has(run):
    guard = run(Base(), table()(), ExpressivityGuard(switch_at=0.5, target_fn=lambda batch: batch[1] + 1))
    assert "other targets than target_fn gives" in guard.measured


class Sigmoid(Base):
    def forward(self, x):
        return torch.sigmoid(super().forward(x))


def test_a_function_after_the_head(run, refused):
    refused(Sigmoid(), table()(), re.escape('pass head="..." if only functions without parameters follow it'))
    guard = run(Sigmoid(), table()(), ExpressivityGuard(switch_at=0.5, head="head"))
    assert (guard.phase, guard.verdict) == (2, "undecided")
    assert guard.caveats == ["what follows the head is taken on trust to be convex with the loss"]


@pytest.mark.parametrize("rule", ["certified", "solve"])
def test_a_rule_for_one_row_of_features_per_sample(run, refused, rule):
    labels = torch.zeros(len(TOKENS), 4, dtype=torch.long)
    guard = ExpressivityGuard(switch_at=0.5, step_rule=rule, loss_fn=nn.CrossEntropyLoss())
    refused(Tokens(), table(TOKENS, labels)(), "'head' has 4 rows of features per sample.*use step_rule='base'", guard)
    certified(run(Tokens(), table(TOKENS, labels)()))


@pytest.mark.parametrize("method", ["alignment", "distinct"])
def test_a_method_for_one_row_of_features_per_sample(run, method):
    guard = run(
        Tokens(), table(TOKENS, torch.zeros(20, 4, dtype=torch.long))(), ExpressivityGuard(switch_at=0.5, method=method)
    )
    assert guard.verdict == "undecided"
    assert "method=" in guard.reason


def test_tokens_that_are_too_many_for_the_head(run):
    module = Tokens()
    module.body[1], module.head = nn.Linear(24, 60), nn.Linear(60, 5)
    guard = run(module, table(TOKENS, torch.zeros(20, 4, dtype=torch.long))())
    assert (guard.phase, guard.verdict) == (1, "undecided")
    assert "m_H + 1 = 61 < n = 80" in guard.reason


def test_a_dry_run_refuses_what_a_run_would(run, refused):
    refused(TwoHeads(), table()(), "make one nn.Linear of them", fast_dev_run=True, max_epochs=1)
    guard = run(Base(), table()(), fast_dev_run=True)
    assert "(observed)" in guard.measured
    assert guard.phase == 1


class LogsNorms(Base):
    def on_before_optimizer_step(self, optimizer):
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).max())


@pytest.mark.parametrize("rule", ["base", "certified", "solve"])
def test_the_gradients_are_there_for_hooks_before_the_step(run, rule):
    guard = ExpressivityGuard(switch_at=0.5, step_rule=rule)
    certified(run(LogsNorms(), table(batch_size=20)(), guard, min_epochs=4))


class LooksAtTheHead(Base):
    def on_train_batch_start(self, batch, batch_idx):
        self.head(torch.rand(3, WIDTH))

    def on_train_batch_end(self, *args):
        self.head(torch.rand(3, WIDTH))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_calls_of_the_head_that_the_loss_knows_nothing_of(run, accumulated):
    certified(run(LooksAtTheHead(), table()(), accumulate_grad_batches=accumulated))


class SecondTerm(Base):
    """A second call of the head that does enter the loss, from the seventh step on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.head(self.trunk(batch[0].flip(1))).mean() if self.trainer.global_step > 10 else 0.0)


def test_a_second_call_of_the_head_that_enters_the_loss_is_not_overlooked(run):
    guard = run(SecondTerm(), table()())
    assert guard.verdict == "undecided"


class NotAlone(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_attributes_that_a_forward_writes_are_those_of_a_run_without_the_guard(make_trainer):
    counts = []
    for callbacks in ([], [ExpressivityGuard(switch_at=0.5)]):
        module = NotAlone()
        make_trainer(callbacks, max_epochs=4).fit(module, table()())
        counts.append(module.calls)
    assert counts[0] == counts[1] == 16
