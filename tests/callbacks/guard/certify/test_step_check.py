"""The claim is about the loss that the training step minimises, by whatever name it goes: members of each kind."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard

SAMPLES, CLASSES, WIDTH = 24, 3, 30


class Net(pl.LightningModule):
    """A wide network with a step of one's own."""

    def __init__(self, step=None, loss_fn=None, trunk=None):
        super().__init__()
        self.trunk = trunk or nn.Sequential(nn.Linear(4, WIDTH), nn.Softplus(10, 40.0))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.extra = nn.Linear(WIDTH, CLASSES)
        if loss_fn is not None:
            self.loss_fn = loss_fn
        self.given = step

    def forward(self, x):
        return self.head(self.trunk(x))

    def training_step(self, batch, batch_idx):
        return self.given(self, *batch) if self.given else self.loss_fn(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.fixture
def fit(make_trainer):
    def go(module, guard=None, batch_size=SAMPLES, **options):
        torch.manual_seed(3)
        data = TensorDataset(torch.randn(SAMPLES, 4), torch.randint(0, CLASSES, (SAMPLES,)))
        guard = guard or ExpressivityGuard(switch_at=2)
        make_trainer([guard], **{"max_epochs": 5} | options).fit(module, DataLoader(data, batch_size))
        return guard

    return go


CLIPPED = {"gradient_clip_val": 0.01}


def checks_of(guard):
    return {check.name: check.held for check in guard.checks}


PLAIN = {
    "functional": (lambda m, x, y: F.cross_entropy(m(x), y), None),
    "module": (None, nn.CrossEntropyLoss()),
    "in a dict": (lambda m, x, y: {"loss": F.cross_entropy(m(x), y), "more": 1}, None),
    "squares of one-hot targets": (lambda m, x, y: F.mse_loss(m(x), F.one_hot(y, CLASSES).float()), None),
    "two losses of the outputs": (lambda m, x, y: F.cross_entropy(m(x), y) if True else None, nn.CrossEntropyLoss()),
    "by hand": (lambda m, x, y: -m(x).log_softmax(1)[range(len(y)), y].mean(), nn.CrossEntropyLoss()),
    "with a metric": (lambda m, x, y: (m.log("a", x.mean()), F.cross_entropy(m(x), y))[1], None),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_loss_is_certified_whatever_its_style(fit, name):
    step, loss_fn = PLAIN[name]
    guard = fit(Net(step, loss_fn))
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])
    assert set(checks_of(guard).values()) == {True}


def late(m, x, y):
    u = m(x)
    return F.cross_entropy(u, y) + (m.current_epoch >= 4) * 0.1 * u.square().mean()


def hidden(term):
    return lambda m, x, y: F.cross_entropy(m(x), y) + term(m, x)


OTHER = {
    "a penalty on all weights": hidden(lambda m, x: 0.1 * sum(p.square().sum() for p in m.parameters())),
    "a small penalty on the head": hidden(lambda m, x: 1e-3 * m.head.weight.square().sum()),
    "a penalty on the features": hidden(lambda m, x: 0.1 * m.trunk(x).square().mean()),
    "another head": hidden(lambda m, x: 0.1 * m.extra(m.trunk(x)).square().mean()),
    "a penalty without a value": hidden(lambda m, x: (r := 0.1 * m.head.weight.square().sum()) - r.detach()),
    "a penalty on the gradient": hidden(
        lambda m, x: (
            torch.autograd.grad(m.trunk(x := x.requires_grad_()).sum(), x, create_graph=True)[0].square().mean()
        )
    ),
    "the mean of the batch": lambda m, x, y: F.cross_entropy((u := m(x)) - u.mean(0), y),
    "the hardest samples": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").topk(4).values.mean(),
    "similar samples": lambda m, x, y: F.cross_entropy((u := F.normalize(m(x))) @ u.T, torch.arange(len(x))),
    "a term that sets in late": late,
    "labels drawn anew": lambda m, x, y: F.cross_entropy(m(x), torch.randint(0, CLASSES, y.shape)),
    "mixed with other samples": lambda m, x, y: F.cross_entropy(m(0.5 * x + 0.5 * x[torch.randperm(len(x))]), y),
    "detached outputs": lambda m, x, y: F.cross_entropy(m(x).detach(), y) + 0 * m.head.weight.sum(),
}


@pytest.mark.parametrize("rule", ["base", pytest.param("solve", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OTHER)
def test_a_step_with_something_else_in_it_is_not_certified(fit, name, rule):
    guard = fit(
        Net(OTHER[name], nn.CrossEntropyLoss() if rule == "solve" else None), ExpressivityGuard(2, step_rule=rule)
    )
    assert guard.phase == 2
    assert guard.verdict == "undecided"
    assert guard.caveats or "compared with the step" in guard.why


def test_a_term_that_depends_on_the_number_of_the_batch_is_found(fit):
    class Odd(Net):
        def training_step(self, batch, batch_idx):
            u = self(batch[0])
            return F.cross_entropy(u, batch[1]) + (batch_idx == 2) * 0.1 * u.square().mean()

    guard = fit(Odd(), batch_size=8)
    assert guard.verdict == "undecided"
    assert "changes during the run" in "".join(guard.caveats), guard.why


def test_a_term_that_waits_for_some_calls_is_found_in_a_step(fit):
    class Patient(Net):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            wait = self.calls > 8 and self.calls < 12
            return F.cross_entropy(self(batch[0]), batch[1]) + wait * 0.1 * self.head.weight.square().sum()

    guard = fit(Patient(), max_epochs=12)
    assert guard.verdict == "undecided"


def test_a_solved_head_is_not_written_where_the_step_has_another_loss(fit):
    module = Net(lambda m, x, y: F.cross_entropy(m(x), (y + 1) % CLASSES), nn.CrossEntropyLoss())
    with pytest.warns(UserWarning, match="step_rule='solve' is for that loss"):
        guard = fit(module, ExpressivityGuard(2, step_rule="solve"))
    assert guard._state.steps == {"rule": "base", "asked": "solve"}
    assert float(module.head.weight.detach().norm()) < 5


def test_a_forward_that_is_only_an_encoder_is_not_certified(fit, make_trainer):
    class Coder(Net):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(CLASSES, 4)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.decoder(self(batch[0])), batch[0])

    guard = fit(Coder())
    assert (guard.head_name, guard.verdict) == ("decoder", "undecided")
    assert "too narrow" in guard.reason
    guard = fit(Coder(), guard=ExpressivityGuard(switch_at=2, forward_fn=lambda module, x: module(x)))
    assert (guard.head_name, guard.verdict) == ("head", "undecided")
    assert "it changes with the weights while these outputs are held" in guard.caveats[0]


class Attention(nn.Module):
    """A Transformer over three positions, of which some are padded; torch's fused path sets those to zero."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.wide = nn.Sequential(nn.Linear(12, WIDTH), nn.Softplus(10, 40.0))

    def forward(self, x):
        padded = torch.arange(3)[None] > (x[:, :1] > 0).long() + 1
        return self.wide(self.encoder(x[:, None].repeat(1, 3, 1), src_key_padding_mask=padded).flatten(1))


def test_phase_two_trains_on_the_features_that_were_certified(fit, monkeypatch):
    trunk, seen = Attention(), []
    module = Net(None, nn.CrossEntropyLoss(), trunk)
    module.head.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().clone()))
    fast = torch.backends.mha.get_fastpath_enabled()
    guard = fit(module)
    assert guard.verdict == "certified"
    assert torch.backends.mha.get_fastpath_enabled() == fast
    # With the fused path the features of phase 2 would be others.
    monkeypatch.setattr("lightning_conv.callbacks.guard.head.trunk.without_fused_attention", lambda: torch.no_grad())
    monkeypatch.setattr(
        "lightning_conv.callbacks.guard.certify.step_check.without_fused_attention", lambda: torch.enable_grad()
    )
    other = fit(Net(None, nn.CrossEntropyLoss(), Attention()))
    assert other.verdict == "undecided"
    assert "once the trunk is frozen" in "".join(other.caveats)


def test_features_that_depend_on_what_needs_a_gradient_are_not_certified(fit):
    class Sly(nn.Sequential):
        def forward(self, x):
            h = super().forward(x)
            return h if any(p.requires_grad for p in self.parameters()) and torch.is_grad_enabled() else 1.1 * h

    guard = fit(Net(None, nn.CrossEntropyLoss(), Sly(nn.Linear(4, WIDTH), nn.Softplus(10, 40.0))))
    assert guard.verdict == "undecided"


class Decay(pl.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad += 0.01 * parameter.detach()


def test_a_callback_that_adds_to_the_gradients_is_found(make_trainer):
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(SAMPLES, 4), torch.randint(0, CLASSES, (SAMPLES,)))
    for order in (0, 1):
        guard = ExpressivityGuard(switch_at=2)
        callbacks = [guard, Decay()] if order else [Decay(), guard]
        make_trainer(callbacks, max_epochs=5).fit(Net(None, nn.CrossEntropyLoss()), DataLoader(data, SAMPLES))
        assert guard.verdict == "undecided"
        assert "gradients" in "".join(guard.caveats)


@pytest.mark.parametrize(
    "options", [CLIPPED, CLIPPED | {"gradient_clip_algorithm": "value"}, {"accumulate_grad_batches": 3}]
)
def test_clipping_and_accumulation_change_no_loss(fit, options):
    guard = fit(Net(None, nn.CrossEntropyLoss()), batch_size=8, **options)
    assert (guard.verdict, guard.why, guard.caveats) == ("certified", "", [])


def test_the_gradients_of_a_random_step_are_compared_all_the_same(fit):
    trunk = nn.Sequential(nn.Linear(4, WIDTH), nn.Softplus(10, 40.0), nn.Dropout(0.5))
    guard = fit(Net(None, nn.CrossEntropyLoss(), trunk))
    assert guard.verdict == "certified"
