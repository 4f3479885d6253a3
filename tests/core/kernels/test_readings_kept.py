"""A network that was read once gives the same kernels, with honest rounding, at other weights and on other samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv import ntk_gram, resolved_spectrum


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3))


def conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()


SEED = torch.Generator().manual_seed(3)
X, IMAGES = torch.randn(20, 6, generator=SEED), torch.randn(20, 2, 4, 4, generator=SEED)


@pytest.mark.parametrize(("make", "x"), [(network, X), (conv, IMAGES)])
@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("count", [20, 7])
def test_a_kept_reading_gives_the_kernel_of_a_new_one(make, x, precision, count):
    model = make()
    plan = ntk_gram(model, x[:12], precision="fast").plan
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(1.7).add_(0.1)
    kept = ntk_gram(model, x[:count], precision=precision, plan=plan, remeasure=True)
    new = ntk_gram(model, x[:count], precision=precision)
    assert torch.allclose(kept.matrix, new.matrix, rtol=1e-6, atol=1e-6 * float(new.matrix.abs().max()))
    assert kept.floor == pytest.approx(new.floor, rel=1e-3)
    assert new.jacobian_error / 4 <= kept.jacobian_error <= 4 * new.jacobian_error


def test_without_remeasure_a_plan_is_for_its_own_sizes():
    model = network()
    plan = ntk_gram(model, X[:12]).plan
    with pytest.raises(ValueError, match="plan: made for"):
        ntk_gram(model, X, plan=plan)


def test_a_kept_reading_still_sees_samples_that_couple():
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            u = self.inner(x)
            return u + u.mean(0) if len(x) > 12 else u

    model = Coupled()
    plan = ntk_gram(model, X[:12]).plan
    with pytest.raises(ValueError, match="couple"):
        ntk_gram(model, X, plan=plan, remeasure=True)


def test_a_reading_that_does_not_fit_any_more_is_left_out():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.other = nn.Linear(6, 3), nn.Linear(6, 3), False

        def forward(self, x):
            return self.b(x) * self.a(x) if self.other else self.a(x) + self.b(x)

    model = Changing()
    first, _ = resolved_spectrum(model, X)
    model.other = True
    gram, _ = resolved_spectrum(model, X, plans={first.precision: first.plan})
    expected = ntk_gram(model, X).matrix
    assert torch.allclose(gram.matrix, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize(("make", "x"), [(network, X), (conv, IMAGES)])
def test_the_rounding_is_measured_in_one_way(make, x):
    model = make()
    first = ntk_gram(model, x, precision="fast", remeasure=True)
    again = ntk_gram(model, x, precision="fast", plan=first.plan, remeasure=True)
    assert again.jacobian_error == first.jacobian_error
