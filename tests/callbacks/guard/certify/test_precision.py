"""Features that the run's own precision does not tell apart, though float64 does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.guard.certify.features_compared import closest_pair
from lightning_conv.callbacks.guard.certify.trunk_rounding import (
    REACHED,
    beyond_rounding,
    reached_in_the_run,
    within_rounding,
)
from lightning_conv.expressivity import certify_expressivity
from tests.callbacks.guard.certify.nets import CLASSES, SWITCH, Net, table


def near_duplicates():
    """Five pairs that differ in the last digit of a small coordinate, with other labels."""
    x, y = table().tensors
    x[:, 3] *= 1e-2
    for k in range(0, 10, 2):
        x[k + 1] = x[k]
        x[k + 1, 3] = torch.nextafter(x[k, 3], torch.tensor(torch.inf))
        y[k], y[k + 1] = 0, 1
    return TensorDataset(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["base", "solve"])
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("singular", "is within the rounding of the features in float32"),
        ("alignment", "the last layer is only shown to reach the targets up to"),
    ],
)
def test_features_that_coincide_in_the_precision_of_the_run(fit, rule, method, said):
    guard = ExpressivityGuard(SWITCH, step_rule=rule, method=method)
    fit(Net(nn.CrossEntropyLoss(), 70), data=near_duplicates(), guard=guard)
    assert guard.verdict != "certified"
    assert said in guard.reason


@pytest.mark.parametrize("rule", ["base", "certified", "solve"])
def test_rank_n_below_the_rounding_of_the_run(fit, rule):
    """Three samples on a ray where GELU is its asymptote in float32: their rows are collinear there, and not in float64."""

    class Ray(Net):
        def __init__(self):
            super().__init__(nn.CrossEntropyLoss())
            self.trunk = nn.Sequential(nn.Linear(4, 70, bias=False), nn.GELU())
            self.trunk[0].weight.data.abs_().add_(0.3)
            self.head = nn.Linear(70, CLASSES)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    x, y = table().tensors
    for place, (size, label) in enumerate([(18.0, 0), (36.0, 1), (72.0, 0)], 10):
        x[place], y[place] = torch.tensor([size, 0.0, 0.0, 0.0]), label
    guard = ExpressivityGuard(switch_at=SWITCH, step_rule=rule, noise_scale=1e-6)
    fit(Ray(), guard=guard, data=TensorDataset(x, y))
    assert guard.verdict != "certified"
    assert "is within the rounding of the features in float32" in guard.reason


class HandMade(Net):
    """The head runs under an autocast of the step's own, in all epochs or in the fifth and sixth."""

    def __init__(self, late, loss_fn=None):
        super().__init__(loss_fn)
        self.from_epoch = 4 if late else 0

    def training_step(self, batch, batch_idx):
        h = self.trunk(batch[0])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.current_epoch >= self.from_epoch):
            u = self.head(h)
        return nn.functional.cross_entropy(u.float(), batch[1])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss()])
def test_a_head_under_an_autocast_of_the_step(fit, late, loss_fn):
    guard = fit(HandMade(late, loss_fn))
    assert (guard.phase, guard.verdict) == (2, "undecided")
    assert "the head computes in torch.bfloat16" in "; ".join(guard.caveats)


def test_a_loss_in_16_bits(fit):
    class Cast(Net):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]).to(torch.bfloat16), batch[1])

    guard = fit(Cast())
    assert guard.verdict == "undecided"
    assert "the loss of the training step is computed in torch.bfloat16" in "; ".join(guard.caveats)


def test_a_flooded_absolute_error(fit):
    class Flooded(Net):
        def training_step(self, batch, batch_idx):
            loss = nn.functional.l1_loss(self(batch[0]), nn.functional.one_hot(batch[1], CLASSES).float())
            return (loss - 0.01).abs() + 0.01

    assert fit(Flooded()).verdict == "undecided"


class Plain(Net):
    def forward(self, x):
        return self.head(self.trunk(x))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["base", "solve"])
def test_one_close_pair_among_many_samples_is_seen_by_distinct(fit, rule):
    """Two of 700 samples differ in the last digit of a small coordinate: at some places of a batch their float32 features are equal."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(700, 4, generator=generator), torch.randint(0, CLASSES, (700,), generator=generator)
    x[:, 3] *= 1e-3
    x[661] = x[2]
    x[661, 3] = torch.nextafter(x[2, 3], torch.tensor(torch.inf))
    y[2], y[661] = 0, 1
    guard = ExpressivityGuard(SWITCH, step_rule=rule, method="distinct")
    fit(Plain(nn.CrossEntropyLoss(), 720), data=TensorDataset(x, y), guard=guard, max_epochs=2)
    assert guard.verdict == "undecided"
    assert "the features of samples" in "; ".join([guard.reason, *guard.caveats])


def rows(tail, seed=0):
    """Ten rows of twelve features, the last of which is the first but for ``tail`` in one place."""
    h = torch.randn(10, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h[-1] = h[0]
    h[-1, 5] += tail
    return h


@pytest.mark.parametrize(
    ("tail", "kept", "verdict", "within"),
    [(1.0, 1.0, "certified", False), (1e-7, 1e-7, "certified", True), (1e-7, 0.0, "undecided", False)],
)
def test_rank_within_rounding_is_asked_of_the_features_in_float32(tail, kept, verdict, within):
    exact, coarse = rows(tail), rows(kept).float()
    coarse[-1, 5] += 1e-6 * (kept > 0)  # a rounding that tells the rows apart
    found = certify_expressivity(exact, method="singular")
    assert found.verdict == "certified"
    made = beyond_rounding(found, float((coarse.double() - exact).norm()), coarse)
    assert (made.verdict, made.rounding > 0) == (verdict, within)
    assert bool(within_rounding(made, varies=True)) == within
    assert within_rounding(made, varies=False) == within_rounding(None, varies=True) == ""


@pytest.mark.parametrize("targets", ["random", "in reach"])
def test_targets_are_reached_by_the_features_of_the_run_as_well(targets):
    """Of the difference of two close rows the head makes any target in float64; rounding takes that away."""
    exact = rows(1e-7)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    y = exact @ weights if targets == "in reach" else torch.randn(10, 2, generator=generator, dtype=torch.float64)

    def again(error):
        return certify_expressivity(exact, method="alignment", targets=y, feature_error=error)

    made = reached_in_the_run(again(0.0), 1e-6, again)
    assert again(0.0).rank_lower == 10
    assert made.rank_lower < 10
    assert (made.residual.upper <= REACHED) == (targets == "in reach")


@pytest.mark.parametrize(("seed", "batch", "size", "pair"), [(1, 5, 2e-3, (0, 4)), (5, 7, 7e-3, (1, 6))])
def test_separation_allows_for_the_rounding_of_the_features(make_trainer, seed, batch, size, pair):
    """The head separates two samples in float64 whose rows are equal in float32 at the same place of a batch."""
    torch.manual_seed(seed)
    x, y = torch.randn(20, 4), torch.randint(0, 10, (20,))
    x[:, 3] *= size
    i, j = pair
    x[j] = x[i]
    x[j, 3] = torch.nextafter(x[i, 3], torch.tensor(10.0))
    y[i], y[j] = 0, 1
    module = Plain(nn.CrossEntropyLoss(), 70)
    module.head = nn.Linear(70, 10)
    guard = ExpressivityGuard(SWITCH, step_rule="solve", method="distinct", on_undecided="continue")
    make_trainer([guard], max_epochs=3).fit(module, DataLoader(TensorDataset(x, y), batch, shuffle=True))
    assert guard.phase == 2
    assert guard.verdict == "undecided"
    assert not guard._state.bounds.separated


@pytest.mark.parametrize("count", [2, 40])
def test_the_closest_pair(count):
    points = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = torch.tensor([1e-3, 1e-3, 1e-2, 1e-3], dtype=torch.float64)
    assert closest_pair(points, apart) is None
    points[-1] = points[0] + torch.tensor([5e-4, -5e-4, 5e-3, 0.0])
    assert set(closest_pair(points, apart)) == {0, count - 1}
    points[-1, 2] = points[0, 2] + 0.02
    assert closest_pair(points, apart) is None
