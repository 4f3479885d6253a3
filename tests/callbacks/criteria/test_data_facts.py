"""What ConvergenceCriteria finds out of the data once a run: separation, close pairs, near orthogonality; and margins."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria
from lightning_conv.callbacks.criteria.papers.allen_zhu.separation import CLOSE, find_separation, judge_separation
from lightning_conv.callbacks.criteria.papers.frei import FreiTracker, find_orthogonality, margin_quantities, signs
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.losses.kind import loss_kind
from lightning_conv.theory.networks import LeakyTwoLayer


def inputs_with_copies(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Seven directions; one twice, one three times as long, one with the noise of float32, one a little further away."""
    torch.manual_seed(3)
    x = torch.randn(7, 20, dtype=torch.float64)
    more = [x[0], 3 * x[1], 0.7 * x[2].float().double(), x[3] + 1e-3 * x[4]]
    return torch.cat([x, torch.stack(more)]).to(dtype)


def by_pairs(x: torch.Tensor) -> dict[tuple[int, int], float]:
    """|x~_i - x~_j| by the identity |u/|u| - v/|v|| / sqrt2."""
    unit = x / x.norm(dim=1, keepdim=True)
    return {(i, j): float((unit[i] - unit[j]).norm()) / math.sqrt(2) for i, j in combinations(range(len(x)), 2)}


def test_pairs_that_point_the_same_way_are_counted_as_a_loop_over_all_pairs_counts_them():
    x = inputs_with_copies()
    pairs = by_pairs(x)
    facts = find_separation(x, torch.arange(11) % 2)
    assert facts.equal_pairs == sum(d < 1e-13 for d in pairs.values()) == 2  # the copy and the multiple
    assert facts.close_pairs == sum(d <= CLOSE for d in pairs.values()) == 3  # and the one through float32
    assert facts.quantities()["close_pairs"] == 3
    assert facts.quantities()["separation"] == pytest.approx(min(pairs.values()), abs=1e-15)
    other = min(d for (i, j), d in pairs.items() if i % 2 != j % 2)
    assert facts.quantities()["separation_by_label"] == pytest.approx(other, abs=1e-15)
    found = {each.name: each for each in facts.criteria(whole_set=True)}
    assert found["separation"].verdict == "undecided"  # 0 is within the rounding
    assert "of 55 pairs 3 are closer than 1e-06, 2 of them equal up to rounding" in found["separation"].reason
    assert (
        find_separation(x.float(), None).close_pairs == 3
    )  # as float32 its multiple is one up to the rounding of float32


def test_separated_data_are_certified_on_the_whole_set_only():
    x = inputs_with_copies()[:7]
    facts = find_separation(x, None)
    whole, part = (facts.criteria(whole_set=flag)[0] for flag in (True, False))
    assert (whole.verdict, part.verdict) == ("certified", "consistent")
    (i, j), least = min(by_pairs(x).items(), key=lambda item: item[1])
    assert f"least between samples {i} and {j}" in whole.reason
    assert whole.measured == pytest.approx(least)
    assert "0 are closer" in whole.reason
    assert "upper bound of the training set's" in part.reason


def test_data_without_a_direction_or_that_are_no_numbers_are_said_to_be_so():
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]])
    zero = find_separation(rows, None)
    assert judge_separation(zero, whole_set=True)[0].verdict == "undecided"
    assert "has no direction" in judge_separation(zero, whole_set=True)[0].reason
    assert isinstance(zero, str)  # there is nothing to log of it
    assert find_orthogonality(rows).kappa.value == 0.0
    words = torch.tensor([[1, 2], [3, 4]])
    separated = judge_separation(find_separation(words, None), whole_set=True)
    assert separated[0].reason == "the input is not one tensor of numbers"
    tracker = FreiTracker()
    tracker.orthogonality, tracker.slope = find_orthogonality(words), 0.5
    assert tracker.criteria(RunView(None, None))[0].verdict == "not applicable"
    assert tracker.orthogonality == "the input is not one tensor of numbers"
    broken = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    assert isinstance(find_separation(broken, None), str)
    assert isinstance(find_orthogonality(broken), str)


def nearly_orthogonal(samples: int = 6, dimension: int = 40) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.zeros(samples, dimension, dtype=torch.float64)
    x[:, :samples] = torch.eye(samples, dtype=torch.float64)
    return x + 1e-3 * torch.randn(samples, dimension, dtype=torch.float64)


SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None]


def run(make_trainer, make_regression, inputs, targets, network, *, loss_fn, batch=None, epochs=2, **options):
    data = TensorDataset(inputs, targets)
    criteria = ConvergenceCriteria("frei", every_n_steps=1)
    make_trainer([criteria], max_epochs=epochs, **options).fit(
        make_regression(network, lr=0.1, loss_fn=loss_fn).double(), DataLoader(data, batch_size=batch or len(data))
    )
    (found,) = criteria.criteria
    return found


def kappa_by_hand(x: torch.Tensor) -> float:
    products = [abs(float(x[i] @ x[j])) for i, j in combinations(range(len(x)), 2)]
    return min(float(row @ row) for row in x) / (len(x) * max(products))


@pytest.mark.slow
def test_near_orthogonality_is_judged_for_the_papers_network_on_the_logistic_loss(
    make_trainer, make_regression, recorder
):
    x = nearly_orthogonal()

    def judged(inputs=x, targets=SIGNS, network=None, loss_fn=None, **options):
        network = network or LeakyTwoLayer(inputs.shape[1], 12, slope=0.5)
        return run(
            make_trainer, make_regression, inputs, targets, network, loss_fn=loss_fn or nn.SoftMarginLoss(), **options
        )

    found = judged(logger=recorder)
    assert found.verdict == "certified"
    assert found.measured == pytest.approx(kappa_by_hand(x), rel=1e-9)
    norms = x.norm(dim=1)
    assert found.bound == pytest.approx(3 * 8 * float(norms.max() / norms.min()) ** 2)
    assert recorder.scalars["theory/near_orthogonality"] == {0: pytest.approx(kappa_by_hand(x), rel=1e-9)}
    assert judged(targets=(SIGNS + 1) / 2, loss_fn=nn.BCEWithLogitsLoss()).verdict == "certified"
    torch.manual_seed(1)
    ordinary = torch.rand(6, 10, dtype=torch.float64)
    assert judged(inputs=ordinary).verdict == "refuted"
    for said, other in (
        ("the run trains another network", judged(network=nn.Sequential(nn.Linear(40, 5), nn.ReLU(), nn.Linear(5, 1)))),
        ("the run's is MSELoss", judged(loss_fn=nn.MSELoss())),
        ("the run's is BCEWithLogitsLoss", judged(targets=(SIGNS + 1) / 2, loss_fn=nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)))),
        ("nothing about the ReLU", judged(network=LeakyTwoLayer(40, 12, slope=0.0))),
        ("not those of two", judged(targets=SIGNS.abs())),
        ("mini-batches", judged(batch=3)),
        ("trains another network; mini-batches", judged(network=nn.Linear(40, 1), batch=3)),
    ):  # fmt: skip
        assert other.verdict == "not applicable"
        assert said in other.reason
        assert other.measured == found.measured


def test_facts_of_the_data_are_logged_once_and_can_always_be_monitored(
    tmp_path, make_trainer, make_regression, recorder
):
    x = inputs_with_copies()
    data = TensorDataset(x, x.sum(1, keepdim=True))

    def fit(epochs, logger, **options):
        torch.manual_seed(0)
        criteria = ConvergenceCriteria(every_n_steps=1)
        trainer = make_trainer([criteria], max_epochs=epochs, logger=logger, checkpoint=epochs == 2)
        network = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 1))
        trainer.fit(make_regression(network, lr=0.01).double(), DataLoader(data, batch_size=11), **options)
        return trainer

    trainer = fit(2, recorder)
    once = {"theory/separation", "theory/close_pairs", "theory/near_orthogonality"}
    assert {tag: set(recorder.scalars[tag]) for tag in once} == {tag: {0} for tag in once}
    assert set(recorder.scalars["theory/loss"]) == {0, 1, 2}
    assert float(trainer.callback_metrics["theory/close_pairs"]) == 3
    other = type(recorder)()
    resumed = fit(4, other, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert float(resumed.callback_metrics["theory/close_pairs"]) == 3
    assert {tag: other.scalars[tag] for tag in once} == {tag: {3: recorder.scalars[tag][0]} for tag in once}
    assert set(other.scalars["theory/loss"]) == {3, 4}


def test_margins_are_those_of_the_run(make_trainer, make_regression, recorder):
    x = nearly_orthogonal()
    network = LeakyTwoLayer(40, 12, slope=0.5, std=0.1)
    run(make_trainer, make_regression, x, SIGNS, network, loss_fn=nn.SoftMarginLoss(), epochs=40, logger=recorder)
    with torch.no_grad():
        values = (network(x) * SIGNS).flatten()
    assert recorder.scalars["theory/margin_min"][40] == pytest.approx(float(values.min()))
    assert recorder.scalars["theory/margin_spread"][40] == pytest.approx(float(values.min() / values.max()))
    assert 0 < recorder.scalars["theory/margin_spread"][40] < 1
    singular = torch.linalg.svdvals(network.weight)
    assert recorder.scalars["theory/numerical_rank"][40] == int((singular > 1e-3 * singular[0]).sum())


def test_margins_are_left_out_where_the_sign_of_one_output_is_no_class():
    outputs, zero_one = torch.tensor([[0.5], [-0.25], [2.0]]), torch.tensor([[1.0], [0.0], [1.0]])
    bce, mse = loss_kind(nn.BCEWithLogitsLoss()), loss_kind(nn.MSELoss())
    assert margin_quantities(outputs, zero_one, bce) == {"margin_min": 0.25, "margin_spread": 0.125}
    assert margin_quantities(outputs, 2 * zero_one - 1, mse) == {"margin_min": 0.25, "margin_spread": 0.125}
    assert margin_quantities(-outputs, zero_one, bce) == {"margin_min": -2.0}  # all on the wrong side
    assert margin_quantities(outputs, zero_one, mse) == {}  # compared with 1/2
    assert margin_quantities(outputs, torch.ones(3, 1), bce) == {}  # one class only
    assert margin_quantities(torch.ones(3, 2), zero_one, bce) == {}


@pytest.mark.parametrize(
    ("targets", "loss_fn", "expected"),
    [
        ([1.0, -1.0, 1.0], nn.MSELoss(), [1.0, -1.0, 1.0]),
        ([[1], [-1]], nn.SoftMarginLoss(), [1.0, -1.0]),
        ([1.0, 0.0], nn.BCEWithLogitsLoss(), [1.0, -1.0]),
        ([[1.0, -1.0], [-1.0, 1.0]], nn.MSELoss(), None),  # dense: two numbers a sample
        ([1.0, -1.0], nn.BCEWithLogitsLoss(), None),
        ([1.0, 0.0], nn.MSELoss(), None),
        ([1.0, -1.0, 0.5], nn.MSELoss(), None),
        ([1.0, -1.0, math.nan], nn.MSELoss(), None),
        ([1.0, 1.0], nn.MSELoss(), None),
        ([-1.0], nn.MSELoss(), None),
        (1.0, nn.MSELoss(), None),
    ],
)
def test_signs_are_those_of_two_classes_with_one_number_a_sample(targets, loss_fn, expected):
    found = signs(torch.tensor(targets), loss_kind(loss_fn))
    assert found is None if expected is None else found.tolist() == expected


def test_dense_targets_are_not_looked_through(monkeypatch):
    def looked(*args, **kwargs):
        raise AssertionError

    for name in ("cpu", "double", "unique"):
        monkeypatch.setattr(torch.Tensor, name, looked)
    assert signs(torch.zeros(4, 3, 8, 8), loss_kind(nn.L1Loss())) is None
