"""Losses of torch times a constant or over the positions of a sequence, against the code that a training step has."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv.losses.arranged import ArrangedLoss, layouts, written_factor
from lightning_conv.losses.kind import loss_kind
from lightning_conv.losses.per_sample import SampleLosses

N, T, V = 4, 5, 6
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(N, T, V, generator=GENERATOR, dtype=torch.float64)
WORDS = torch.randint(V, (N, T), generator=GENERATOR)
CE = nn.CrossEntropyLoss()

FORMS = {
    "flat": (ArrangedLoss(CE, classes=V), lambda u, y: F.cross_entropy(u.flatten(0, 1), y.flatten())),
    "transposed": (ArrangedLoss(CE, classes=V), lambda u, y: F.cross_entropy(u.transpose(1, 2), y)),
    "shifted": (
        ArrangedLoss(CE, classes=V, shifted=1),
        lambda u, y: F.cross_entropy(u[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ),
    "ignored": (
        ArrangedLoss(nn.CrossEntropyLoss(ignore_index=2), 0.5, classes=V),
        lambda u, y: 0.5 * F.cross_entropy(u.transpose(1, 2), y, ignore_index=2),
    ),
    "ahead": (
        ArrangedLoss(CE, classes=V, tail=1),
        lambda u, y: F.cross_entropy(u.transpose(1, 2), torch.cat([y[:, :1], y], 1)[:, 1:]),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_an_arranged_loss_is_what_the_step_writes(name):
    form, step = FORMS[name]
    targets = torch.cat([WORDS[:, :1], WORDS], 1) if name == "ahead" else WORDS
    for u in (LOGITS, LOGITS.flatten(1)):  # as rows of a sample, too
        assert float(form(u, targets)) == pytest.approx(float(step(LOGITS, WORDS)), rel=1e-12)
    kind = loss_kind(form)
    assert (kind.kind, kind.scale(N, T * V), kind.facts(LOGITS, WORDS)) == ("other", None, None)
    assert "over the positions" in kind.described


def test_the_forms_that_are_tried_have_the_steps_among_them():
    tried = list(layouts((CE,), LOGITS, V, ignored=[2]))
    assert {(each.classes, each.shifted, each.tail, each.base.ignore_index) for each in tried} >= {
        (V, 0, 0, -100), (V, 1, 0, -100), (V, 0, 1, -100), (V, 0, 0, 2)
    }  # fmt: skip


@given(st.integers(1, 400), st.integers(1, 64), st.floats(-1e-6, 1e-6))
@settings(max_examples=60, deadline=None)
def test_a_written_factor_is_found_from_a_measured_one(p, q, noise):
    exact = Fraction(p, q)
    found = written_factor(float(exact) * (1 + noise))
    assert found is not None
    assert abs(found / float(exact) - 1) <= 4e-6


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.3, 0.05, 1 / 784, 100.0, 1 / 3, 0.125])
def test_factors_that_people_write_are_exact(factor):
    assert written_factor(factor * (1 + 3e-7)) == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize("measured", [0.0, -1.0, float("nan"), float("inf"), 0.1234567, 3.1415926])
def test_other_numbers_are_no_factors(measured):
    assert written_factor(measured) is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_scale_of_a_scaled_squared_error_is_exact(reduction):
    n, c, factor = 3, 2, Fraction(3, 8)
    u, y = (
        [[Fraction(i * c + k, 7) for k in range(c)] for i in range(n)],
        [[Fraction(k - i, 5) for k in range(c)] for i in range(n)],
    )
    squares = sum((u[i][k] - y[i][k]) ** 2 for i in range(n) for k in range(c))
    loss = factor * squares / (n * c if reduction == "mean" else 1)
    form = ArrangedLoss(nn.MSELoss(reduction=reduction), float(factor))
    kind = loss_kind(form)
    scale = kind.scale(n, c)
    assert scale is not None
    assert scale.k == pytest.approx(float(loss / (squares / 2)), rel=1e-15)
    as_tensor = [torch.tensor([[float(x) for x in row] for row in each], dtype=torch.float64) for each in (u, y)]
    assert float(kind.evaluate(*as_tensor)) == pytest.approx(float(loss), rel=1e-14)
    assert kind.described.startswith("0.375 x MSELoss")


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_the_facts_of_a_scaled_cross_entropy_are_scaled(factor):
    labels, smoothed = torch.tensor([0, 2, 1]), nn.CrossEntropyLoss(label_smoothing=0.2)
    u = torch.zeros(3, 3, dtype=torch.float64)
    plain, scaled = loss_kind(smoothed).facts(u, labels), loss_kind(ArrangedLoss(smoothed, factor)).facts(u, labels)
    # the best outputs are the logarithms of the smoothed labels
    q = 0.8 * F.one_hot(labels, 3).double() + 0.2 / 3
    assert scaled.infimum == pytest.approx(factor * float(smoothed(q.log(), labels)), rel=1e-12)
    assert scaled.smoothness == pytest.approx(factor * plain.smoothness, rel=1e-15)
    hessian = torch.autograd.functional.hessian(
        lambda x: factor * smoothed(x[None], labels[:1]), torch.tensor([0.0, 0.0, -40.0]).double()
    )
    assert float(torch.linalg.eigvalsh(hessian)[-1]) <= scaled.smoothness * (1 + 1e-9)


def test_what_needs_the_loss_itself_is_not_claimed_of_a_multiple():
    bits = torch.tensor([[0.0], [1.0]])
    assert loss_kind(nn.BCEWithLogitsLoss()).logistic
    assert not loss_kind(ArrangedLoss(nn.BCEWithLogitsLoss(), 2.0)).logistic
    assert SampleLosses(ArrangedLoss(nn.BCEWithLogitsLoss(), 2.0), bits).kind == "custom"
    assert loss_kind(ArrangedLoss(nn.MSELoss(), 2.0)).distance
