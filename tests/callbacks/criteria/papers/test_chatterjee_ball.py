"""Chatterjee's criterion in a run: what the path and a search around the start refute, and what nothing refutes that is proven."""

import copy
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceCriteria
from lightning_conv.callbacks.criteria.papers.chatterjee import tracker as start_evidence
from lightning_conv.callbacks.criteria.papers.chatterjee.ball import (
    BallSearch,
    ProbeLandscape,
    ball_criterion,
    search_ball,
)
from lightning_conv.losses.objective import Objective
from lightning_conv.theory.papers.chatterjee import certify_descent, positive_init_
from lightning_conv.theory.tools.observation import Observation


@pytest.fixture
def one_output(one_hot_digits) -> TensorDataset:
    inputs, targets = one_hot_digits.tensors
    return TensorDataset(inputs[:12].double(), (targets[:12, :5].sum(1, keepdim=True) * 2 - 1).double())


@pytest.fixture
def smooth(make_regression):
    def make(lr: float = 0.05, **options):
        torch.manual_seed(0)
        return make_regression(nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1)), lr=lr, **options).double()

    return make


def whole(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=len(data))


def found(callback: ConvergenceCriteria, name: str = "criterion_in_the_ball"):
    return next(each for each in callback.criteria if each.name == name)


def test_the_landscape_is_the_objective(smooth, one_output):
    network, (inputs, targets) = smooth().network, one_output.tensors
    objective = Objective(network, inputs, targets, nn.MSELoss())
    landscape = ProbeLandscape(network, inputs, targets, nn.MSELoss(), [n for n, _ in network.named_parameters()], 0.0)
    assert torch.equal(landscape.start, objective.start)
    generator = torch.Generator().manual_seed(1)
    x, v = (torch.randn(objective.size, generator=generator, dtype=torch.float64) for _ in range(2))
    for point in (objective.start, objective.start + x):
        value, gradient = landscape.value_and_gradient(point)
        expected, slope = objective.value_and_gradient(point)
        assert value == pytest.approx(expected, rel=1e-12)
        assert torch.allclose(gradient, slope, rtol=1e-10, atol=1e-14)
    exact = objective.hessian_product(x, v)
    assert float((landscape.hessian_product(x, v) - exact).norm()) <= 1e-7 * float(exact.norm())


def test_every_ratio_that_was_found_is_one_of_a_point_in_the_ball(smooth, one_output, monkeypatch):
    network, (inputs, targets) = smooth().network, one_output.tensors
    names = [name for name, _ in network.named_parameters()]
    landscape = ProbeLandscape(network, inputs, targets, nn.MSELoss(), names, 0.0)
    still = landscape.still_points(targets.mean(0))[-1]
    assert float(landscape.value_and_gradient(still)[1].norm()) < 1e-14  # no gradient there
    reach = float((still - landscape.start).norm())
    far = search_ball(landscape, 1.5 * reach, mean=targets.mean(0))
    near = search_ball(landscape, 0.1 * reach, mean=targets.mean(0))
    assert min(ratio for _, ratio in far.points) < 1e-20
    assert 0 < min(ratio for _, ratio in near.points) < near.points[0][1]
    assert max(distance for distance, _ in near.points) <= 0.1 * reach
    assert near.points[0][0] == 0.0


def test_the_path_alone_refutes_radii_and_leaves_larger_ones_open(make_trainer, smooth, one_output, recorder):
    criteria = ConvergenceCriteria("chatterjee", every_n_steps=1)
    make_trainer([criteria], max_epochs=8, logger=recorder).fit(smooth(), whole(one_output))
    judged = found(criteria)
    assert judged.verdict == "undecided"
    assert "larger ones are open" in judged.reason
    scalars = recorder.scalars
    loss = scalars["theory/loss"][0]
    distances, ratios = ([scalars[f"theory/{name}"][t] for t in range(9)] for name in ("distance", "pl_ratio"))
    ends = [*distances[1:], distances[-1]]  # distances grow in this run
    by_hand = max(end**2 * min(ratios[: t + 1]) / (4 * loss) for t, end in enumerate(ends))
    assert judged.measured == pytest.approx(by_hand, rel=1e-5)
    assert f"up to {2 * math.sqrt(loss / min(ratios)):.3g}"[:9] in judged.reason


def test_a_search_refutes_up_to_the_radius_and_a_small_ball_is_left_open(make_trainer, smooth, one_output):
    verdicts = {}
    for radius in (10.0, 1e4):
        criteria = ConvergenceCriteria("chatterjee", every_n_steps=4, radius=radius)
        make_trainer([criteria], max_epochs=4).fit(smooth(), whole(one_output))
        judged = found(criteria)
        verdicts[radius] = judged.verdict
        assert f"r <= {radius:.4g}" in judged.asks
    # All weights zero, a point without a gradient, lies within both.
    assert verdicts == {10.0: "refuted", 1e4: "refuted"}


def test_what_is_proven_is_not_refuted_and_its_hypotheses_are_told(make_trainer, make_regression):
    data = TensorDataset(
        torch.eye(4, 6, dtype=torch.float64), torch.tensor([[0.5], [-0.3], [0.2], [0.1]], dtype=torch.float64)
    )
    network = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    positive_init_(network, A=100.0)
    certificate = certify_descent(network, data.tensors[0], data.tensors[1].flatten())
    criteria = ConvergenceCriteria("chatterjee", every_n_steps=1, radius=2 * certificate.radius)
    make_trainer([criteria], max_epochs=2).fit(make_regression(network, lr=certificate.step / 2).double(), whole(data))
    assert found(criteria).verdict == "undecided"
    assert found(criteria).measured >= certificate.flow.measured
    assert found(criteria, "independent_inputs").verdict == "certified"
    smallest = torch.linalg.svdvals(torch.cat([data.tensors[0], torch.ones(4, 1)], 1))[-1]
    assert found(criteria, "independent_inputs").measured == pytest.approx(float(smallest) ** 2)
    assert found(criteria, "positive_start").verdict == "certified"


@pytest.mark.parametrize("positive", [True, False])
def test_more_samples_than_dimensions_refute_a_hypothesis_of_a_positive_start_and_no_run_fails_by_it(
    make_trainer, make_regression, positive
):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(9, 3).double(), torch.randn(9, 1).double())
    criteria = ConvergenceCriteria("chatterjee", every_n_steps=1)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    if positive:
        positive_init_(network, A=1.0)
    make_trainer([criteria], max_epochs=1).fit(make_regression(network, lr=1e-3).double(), whole(data))
    independent, start = found(criteria, "independent_inputs"), found(criteria, "positive_start")
    smallest = torch.linalg.eigvalsh((wide := torch.cat([data.tensors[0], torch.ones(9, 1)], 1)) @ wide.T)[0]
    assert independent.measured == pytest.approx(float(smallest), abs=1e-12)  # 4 columns for 9 samples
    if positive:
        assert (independent.verdict, start.verdict) == ("refuted", "certified")
    else:
        assert (independent.verdict, start.verdict) == ("not applicable", "not applicable")
        assert independent.reason == start.reason
        assert independent.reason.startswith("another start: ")
        assert "W_1 has entries up to" in start.reason
    failed = {each.name for each in criteria.criteria if each.verdict == "refuted"} - {"independent_inputs"}
    assert criteria.metrics["theory/refuted"] == len(failed)


def test_the_search_leaves_the_run_alone_and_is_done_once(tmp_path, make_trainer, smooth, one_output, monkeypatch):
    searches = []
    real = search_ball

    def counted(*args, **kwargs):
        searches.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(start_evidence, "search_ball", counted)

    def run(epochs, radius=None, checkpoint=False, **kwargs):
        module = smooth()
        module.register_buffer("drawn", torch.zeros(()))
        own = module.training_step
        module.training_step = lambda batch, batch_idx: own(batch, batch_idx) + 0 * module.drawn.copy_(torch.rand(()))
        criteria = ConvergenceCriteria("chatterjee", every_n_steps=1, radius=radius)
        torch.manual_seed(3)
        make_trainer([criteria], max_epochs=epochs, checkpoint=checkpoint).fit(module, whole(one_output), **kwargs)
        return module, criteria

    plain, _ = run(4)
    assert not searches
    watched, first = run(4, radius=2.0)
    assert len(searches) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    run(2, radius=2.0, checkpoint=True)
    _, resumed = run(4, radius=2.0, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert len(searches) == 2  # none after the checkpoint
    assert found(resumed).measured == pytest.approx(found(first).measured, rel=1e-9)
    assert found(resumed).verdict == found(first).verdict


def test_where_the_theorem_does_not_cover_the_run_nothing_is_searched(make_trainer, smooth, one_output, monkeypatch):
    monkeypatch.setattr(start_evidence, "search_ball", lambda *_, **__: pytest.fail("searched"))
    criteria = ConvergenceCriteria("chatterjee", every_n_steps=1, radius=1.0)
    make_trainer([criteria], max_epochs=1).fit(smooth(momentum=0.9), whole(one_output))
    assert found(criteria).verdict == "not applicable"
    assert "momentum" in found(criteria).reason


def test_a_search_that_fails_ends_no_run(lenient, make_trainer, smooth, one_output, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(start_evidence, "search_ball", broken)
    criteria = ConvergenceCriteria("chatterjee", every_n_steps=1, radius=1.0)
    with pytest.warns(UserWarning, match="was not searched"):
        make_trainer([criteria], max_epochs=2).fit(smooth(), whole(one_output))
    assert found(criteria).verdict in ("undecided", "refuted")


def test_rounding_near_the_minimum_is_no_counterexample():
    """A loss that is rounding, with a gradient that is smaller than it should be."""
    history = [
        Observation(0, 1.0, 2.0, 0.0, noise=1e-6),
        Observation(1, 1e-9, 1e-12, 1.0, noise=1e-6),  # ratio 1e-15
    ]
    judged = ball_criterion(history, None, 3.0)
    assert judged.verdict == "undecided"
    assert judged.measured == pytest.approx(9 * 4 / 4, rel=3e-3)
    unknown = ball_criterion([Observation(0, math.nan, math.nan, 0.0)], None, None)
    assert (unknown.verdict, math.isnan(unknown.measured)) == ("undecided", True)


def test_the_state_is_plain_and_comes_back():
    search = BallSearch(((0.0, 2.0), (0.5, 0.25)), "")
    assert BallSearch.from_state(copy.deepcopy(search.state())) == search


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(MisconfigurationException, match="radius: "):
        ConvergenceCriteria(radius=radius)


def test_near_an_infimum_above_zero_a_difference_that_is_rounding_refutes_nothing():
    """Cross-entropy with soft targets attains its infimum, 0.61; the ratio tends to 2 p (1 - p) = 0.42 there."""
    network = nn.Linear(1, 1, bias=False).double()
    target, loss_fn = torch.tensor([[0.3]]).double(), nn.BCEWithLogitsLoss()
    best = math.log(0.3 / 0.7)
    with torch.no_grad():
        network.weight.fill_(best)
    infimum = float(loss_fn(network(torch.ones(1, 1).double()), target).detach())
    landscape = ProbeLandscape(network, torch.ones(1, 1).double(), target, loss_fn, ["weight"], infimum)
    ratios = []
    for distance in (1e-2, 1e-4, 1e-6, 1e-7, 1e-8, 1e-9):
        value, gradient = landscape.value_and_gradient(torch.tensor([best + distance]).double())
        if value > 0:
            ratios.append(float(gradient.square().sum()) / value)
    assert ratios
    assert min(ratios) > 0.4
    history = [Observation(0, 1.0, 1.0, 0.0, noise=1e-14), Observation(1, 1e-13, 1e-9, 1.0, noise=1e-14)]
    assert ball_criterion(history, None, 3.0).measured == pytest.approx(0.25, rel=1e-6)
    assert ball_criterion(history, None, 3.0, infimum=0.61).measured == pytest.approx(9 / 4, rel=1e-6)
