"""The audit is the regression without each sample with an independent kernel, and bad input is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from dense_kernels import naive_gram
from torch import nn
from torch.nn import functional as F

from lightning_conv import label_audit
from lightning_conv.health.labels.audit_labels import audit_labels
from lightning_conv.health.labels.class_labels import class_labels
from lightning_conv.health.labels.label_audit import PROJECTED, sample_losses
from lightning_conv.health.labels.label_margins import gaussian_kernel

WRONG = [4, 11, 23]


def net(outputs=3, features=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 24), nn.Tanh(), nn.Linear(24, outputs))


def blobs(count=45, classes=3):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % classes
    centres = 3.0 * torch.randn(classes, 5, generator=generator)
    x = centres[labels] + torch.randn(count, 5, generator=generator)
    given = labels.clone()
    given[WRONG] = (labels[WRONG] + 1) % classes
    return x, given, labels


def refit_without(kernel, labels, ridge):
    """Scores of each sample from a solve on all others, (n, C)."""
    y = F.one_hot(labels).double()
    y_centred = y - y.mean(0)
    rows = []
    for i in range(len(labels)):
        rest = [j for j in range(len(labels)) if j != i]
        a = kernel[rest][:, rest] + ridge * torch.eye(len(rest), dtype=torch.float64)
        rows.append(kernel[i, rest] @ torch.linalg.solve(a, y_centred[rest]) + y.mean(0))
    return torch.stack(rows)


def margins_of(scores, labels):
    found = []
    for i, label in enumerate(labels.tolist()):
        found.append(float(scores[i, label] - max(s for c, s in enumerate(scores[i].tolist()) if c != label)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def audit():
    x, given, _ = blobs()
    return label_audit(net(), x, given, precision="certified")


def test_margins_are_those_of_a_refit_without_the_sample_with_the_kernel_of_autograd(audit):
    x, given, _ = blobs()
    kernel = naive_gram(net().double(), x.double(), "trace")
    scores = refit_without(kernel, given, audit.ridge)
    assert torch.allclose(audit.margins, margins_of(scores, given), atol=1e-8)
    assert torch.equal(audit.suggested, scores.argmax(1))
    assert audit.agreement == pytest.approx(float((scores.argmax(1) == given).double().mean()))


def test_each_baseline_is_what_it_says(audit):
    x, given, _ = blobs()
    model = net()
    hidden = model[:2](x).detach()
    for name, rows in (("inputs", x), ("features", hidden)):
        best = min(
            (
                margins_of(s, given)
                for s in (refit_without(gaussian_kernel(rows), given, 10.0**p) for p in range(-8, 2))
            ),
            key=lambda m: float((m - audit.baselines[name]).abs().max()),
        )
        assert torch.allclose(audit.baselines[name], best, atol=1e-6), name
    assert torch.allclose(
        audit.baselines["loss"], -F.cross_entropy(model(x), given, reduction="none").detach().double(), atol=1e-5
    )


def test_changed_labels_come_first_with_the_true_one_suggested_and_their_ranks(audit):
    _, given, true = blobs()
    top = audit.top(20)
    assert {each.number for each in top[:3]} == set(WRONG)
    assert all(each.suggested == true[each.number] for each in top[:3])
    assert [each.rank for each in top] == list(range(1, 21))
    assert [each.margin for each in top] == sorted(float(m) for m in audit.margins)[:20]
    for each in top:
        assert each.given == given[each.number]
        for name, scores in audit.baselines.items():
            assert each.ranks[name] == 1 + int((scores < scores[each.number]).sum()), name
    assert audit.beyond(top[2].margin).tolist() == [each.number for each in top[:3]]


def test_the_table_names_the_samples_of_the_training_set(audit):
    first = audit.top(1)[0]
    lines = audit.table(2, numbers=[100 + i for i in range(45)]).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("| rank | sample | of the training set | given | suggested | margin | rank by inputs |")
    assert lines[2].startswith(
        f"| 1 | {first.number} | {100 + first.number} | {first.given} | {first.suggested} | {first.margin:.3f} |"
    )
    assert "of the training set" not in audit.table()
    assert len(audit.table().splitlines()) == 22
    narrow = audit.narrow_table(2, numbers=[100 + i for i in range(45)]).splitlines()
    assert narrow[0] == "| sample | given | suggested | margin |"
    first = audit.top(1)[0]
    assert narrow[2].startswith(f"| {first.number} ({100 + first.number} of the training set) | {first.given} |")
    assert audit.narrow_table(1).splitlines()[2].startswith(f"| {first.number} | ")
    assert "*rank by loss*: the loss of the sample, largest first." in audit.markdown()


def test_the_model_stays_as_it_is():
    x, given, _ = blobs()
    model = net().train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    label_audit(model, x, given)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_sample_that_is_alone_in_its_class_is_not_judged():
    x, given, _ = blobs()
    alone = given.clone()
    alone[7] = 9
    audit = label_audit(net(10), x, alone)
    assert int(audit.judged.sum()) == 44
    assert 7 not in audit.order
    assert "Not judged: 1 samples that are the only ones of their label." in audit.markdown()


def test_what_a_baseline_lacks_is_said():
    x, given, _ = blobs()
    tokens = (x.abs() * 3).long().clamp(max=9)

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.w = nn.Embedding(10, 6), nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return self.e(x).mean(1) @ self.w

    audit = label_audit(Bag(), tokens, given, loss_fn=lambda u, y: (u[:, 0] ** 2).mean())
    assert audit.baselines == {}
    assert set(audit.left_out) == {"inputs", "features", "loss"}
    assert "whole numbers" in audit.left_out["inputs"]
    assert "no nn.Linear" in audit.left_out["features"]
    assert "not one of torch's losses" in audit.left_out["loss"]
    assert "*rank by inputs* is left out" in audit.markdown()


def test_many_outputs_are_projected_unless_the_trace_is_asked_for(monkeypatch):
    from lightning_conv.health.labels import label_audit as module

    asked, original = [], module.ntk_gram
    monkeypatch.setattr(module, "ntk_gram", lambda *a, **k: asked.append(k["outputs"]) or original(*a, **k))
    x, given, _ = blobs()
    label_audit(net(PROJECTED + 1), x, given)
    label_audit(net(PROJECTED + 1), x, given, outputs="trace")
    label_audit(net(PROJECTED), x, given)
    assert asked == ["projected", "trace", "trace"]


def test_losses_are_those_of_torch():
    u = torch.randn(12, 3)
    labels = torch.arange(12) % 3
    ones = F.one_hot(labels, 3).float()
    assert torch.allclose(
        sample_losses(u, labels, labels), F.cross_entropy(u, labels, reduction="none").double(), atol=1e-6
    )
    squared = ((u - ones) ** 2).mean(1).double()
    assert torch.allclose(sample_losses(u, ones, labels, nn.MSELoss()), squared, atol=1e-6)
    two = labels.clamp(max=1) * 2 - 1
    logit = F.binary_cross_entropy_with_logits(u[:, 0], (two > 0).float(), reduction="none").double()
    assert torch.allclose(sample_losses(u[:, :1], two, two), logit, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "labels"),
    [
        (torch.tensor([2, 0, 1]), [2, 0, 1]),
        (torch.tensor([[2], [0], [1]]), [2, 0, 1]),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), [1, 0, 1]),
        (torch.tensor([0.0, 1.0, 1.0]), [0, 1, 1]),
        (torch.tensor([-1.0, 1.0, 1.0]), [-1, 1, 1]),
        (torch.tensor([True, False, True]), [1, 0, 1]),
    ],
)
def test_labels_come_in_the_forms_of_losses(targets, labels):
    assert class_labels(targets).tolist() == labels


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (torch.tensor([0.5, 1.0, 2.5]), "numbers such as 0.5 of a regression"),
        (torch.rand(3, 4), "not one 1 and zeros for each sample"),
        (torch.tensor([[1, 1], [1, 0], [0, 1]]), "sample 0 has 2 labels"),
        (torch.tensor([[0, 1], [0, 0], [0, 1]]), "sample 1 has 0 labels"),
        (torch.zeros(3, 2, 2), r"shape \(3, 2, 2\)"),
        (torch.tensor([0, 1, -100]), "the label -100 is negative"),
        (torch.tensor([0.0, torch.nan, 1.0]), "not all finite"),
        (torch.tensor(1), "one label for each sample"),
        (torch.tensor([0, 1]), "for 3 samples"),
    ],
)
def test_targets_that_are_no_labels_are_refused(targets, says):
    with pytest.raises(ValueError, match=says):
        class_labels(targets, 3)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="targets: list"):
        class_labels([0, 1])


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (torch.rand(45), "regression"),
        (torch.zeros(45, dtype=torch.long), "one class only"),
        (torch.arange(45), "each of the 45 labels occurs once"),
        (torch.arange(44) % 3, "for 45 samples"),
    ],
)
def test_bad_targets_are_refused_before_anything_expensive(targets, says, monkeypatch):
    from lightning_conv.health.labels import label_audit as module

    monkeypatch.setattr(module, "ntk_gram", lambda *a, **k: pytest.fail("a kernel was computed"))
    with pytest.raises(ValueError, match=says):
        label_audit(net(), blobs()[0], targets)


def test_bad_inputs_are_refused():
    x, given, _ = blobs()
    with pytest.raises(ValueError, match="targets: 6 samples; need at least 10"):
        label_audit(net(), x[:6], given[:6])
    broken = x.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        label_audit(net(), broken, given)
    with pytest.raises(ValueError, match='batch_norm: "batch"'):
        label_audit(net(), x, given, batch_norm="batch")
    with pytest.raises(ValueError, match=r"kernel: shape \(45,\)"):
        audit_labels(torch.ones(45), given)
    with pytest.raises(ValueError, match=r"losses: shape \(3,\)"):
        audit_labels(torch.eye(45), given, losses=torch.ones(3))


class Untouched(nn.Module):
    """A network that fails if it is evaluated."""

    def forward(self, x):
        raise AssertionError("was evaluated")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"outputs": "full"}, ValueError, "outputs: 'full' is not one of None, 'trace', 'projected'"),
        ({"outputs": "sum"}, ValueError, "outputs: 'sum' is not one of None, 'trace', 'projected'"),
        ({"outputs": "cotangents"}, ValueError, "outputs: 'cotangents' is not one of None, 'trace', 'projected'"),
        ({"precision": "best"}, ValueError, "precision: 'best' is not one of 'fast', 'exact', 'certified'"),
        ({"batch_norm": "train"}, ValueError, "batch_norm: 'train' is not one of 'eval', 'frozen'"),
        ({"seed": "a"}, TypeError, "seed: 'a' (str); need a whole number, such as 0"),
        ({"seed": None}, TypeError, "seed: None; need a whole number, such as 0"),
        ({"model": None}, TypeError, "model: None; need a torch.nn.Module, such as the network of a LightningModule"),
        (
            {"loss_fn": 3},
            TypeError,
            "loss_fn: 3 (int) cannot be called; need nn.CrossEntropyLoss() or a function of (outputs, targets)",
        ),
        ({"loss_fn": nn.MSELoss}, TypeError, "loss_fn: the class MSELoss; need a loss of it, such as MSELoss()"),
        (
            {"ridge": "a"},
            ValueError,
            "ridge: 'a'; need a finite number above 0, or None for the one with the least error",
        ),
        (
            {"max_memory": "a"},
            ValueError,
            "max_memory: 'a'; give a positive number of bytes, or None for a quarter of the free memory",
        ),
        (
            {"progress": "a"},
            TypeError,
            "progress: 'a' (str); need True, False, None or a function of the share that is done",
        ),
        (
            {"inputs": 3.0},
            TypeError,
            "inputs: expected a tensor, a tuple or a mapping of tensors, got float; pass tensors only",
        ),
        (
            {"targets": torch.zeros(45).long()},
            ValueError,
            "targets: one class only, so nothing can be compared; pass samples of at least two classes",
        ),
    ],
)
def test_a_bad_argument_is_named_before_the_network_is_evaluated(options, error, says):
    x, given, _ = blobs()
    with pytest.raises(error) as raised:
        label_audit(**{"model": Untouched(), "inputs": x, "targets": given, **options})
    assert str(raised.value) == says


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kernel": "a"}, TypeError, "kernel: 'a' (str); need a matrix (n, n)"),
        ({"kernel": torch.eye(45)[:5]}, ValueError, "kernel: shape (5, 45); need (n, n)"),
        ({"inputs": torch.zeros(6, 2)}, ValueError, "inputs: 6 samples; need those of the 45 targets"),
        ({"features": torch.zeros(6, 2)}, ValueError, "features: shape (6, 2); need rows of each of 45 samples"),
        ({"features": "a"}, TypeError, "features: 'a' (str); need the last hidden features, (n, m)"),
        ({"losses": "a"}, TypeError, "losses: 'a' (str); need the loss of each sample, (n,)"),
        ({"ridge": -1.0}, ValueError, "ridge: -1.0; need a finite number above 0"),
    ],
)
def test_parts_of_an_audit_that_do_not_belong_together_are_refused(options, error, says):
    _, given, _ = blobs()
    with pytest.raises(error) as raised:
        audit_labels(**{"kernel": torch.eye(45), "targets": given, **options})
    assert str(raised.value).startswith(says)


def test_losses_with_nan_are_no_baseline():
    _, given, _ = blobs()
    losses = torch.zeros(45)
    losses[3] = torch.nan
    audit = audit_labels(torch.eye(45), given, losses=losses)
    assert audit.baselines == {}
    assert audit.left_out == {"loss": "a loss is NaN"}


def test_losses_of_other_samples_than_the_outputs_are_refused():
    labels = torch.arange(12) % 3
    with pytest.raises(ValueError, match=r"outputs: shape \(11, 3\) for 12 targets and 12 labels; need \(n, C\)"):
        sample_losses(torch.zeros(11, 3), labels, labels)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda a: a.top("a"), TypeError, "count: 'a' (str); need a whole number of at least 0"),
        (lambda a: a.top(-1), ValueError, "count: -1; need a whole number of at least 0"),
        (lambda a: a.table(-1), ValueError, "count: -1; need a whole number of at least 0"),
        (lambda a: a.table(numbers=[1]), ValueError, "numbers: 1 of them; need one for each of 45 samples"),
        (lambda a: a.markdown(numbers=[1]), ValueError, "numbers: 1 of them; need one for each of 45 samples"),
        (lambda a: a.beyond("a"), TypeError, "limit: 'a' (str); need a number"),
        (lambda a: a.beyond(torch.nan), ValueError, "limit: nan; need a number"),
    ],
)
def test_what_an_audit_is_asked_for_is_checked(audit, call, error, says):
    with pytest.raises(error) as raised:
        call(audit)
    assert str(raised.value) == says


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_targets_are_refused(shape):
    with pytest.raises(ValueError, match=r"targets: shape .*; need one label for each sample"):
        class_labels(torch.zeros(shape))
