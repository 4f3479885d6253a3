"""The verdict is about the infimum of the last layer's problem: neither a low rank nor unreached targets refute it by themselves."""

from __future__ import annotations

import math
import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv import certify_expressivity
from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.guard.certify.verdict import HeadBounds, verdict_on, where_attained
from lightning_conv.last_layer import HeadProblem, solve_head
from lightning_conv.losses.kind import loss_kind

SWITCH = 6


@pytest.fixture
def run(make_trainer, make_module):
    """A run without weight decay, so that nothing limits the argument."""

    def go(guard, data, loss_fn=None, width=120, change=lambda module: None):
        module = make_module(width=width)
        if width < 96:
            module.trunk[5] = nn.Tanh()
        module.loss_fn = loss_fn or module.loss_fn
        change(module)
        module.configure_optimizers = lambda: torch.optim.SGD(
            [p for p in module.parameters() if p.requires_grad], lr=0.05, momentum=0.9
        )
        make_trainer([guard]).fit(module, DataLoader(data, 32))
        return module

    return go


@pytest.fixture
def two_classes(make_loader):
    """Digits, whose class is whether one pixel is bright: separable by any sensible trunk."""
    inputs = make_loader().dataset.tensors[0]
    return TensorDataset(inputs, (inputs[:, 10] > inputs[:, 10].median()).long())


def two_clusters(samples=30):
    """Features of width 1, much narrower than n, that separate two classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 2
    return (2.0 * labels - 1 + 0.3 * torch.rand(samples, generator=generator))[:, None].double(), labels


def test_separable_features_of_a_narrow_head_have_the_global_infimum_though_the_labels_are_out_of_reach():
    features, labels = two_clusters()
    certificate = certify_expressivity(features, method="alignment", targets=labels)
    assert certificate.verdict == "refuted"
    assert certificate.residual.lower > 0.01
    kind = where_attained(loss_kind(nn.CrossEntropyLoss()), labels)
    # By hand: along one direction the loss falls below every bound, so its infimum is 0, the global one.
    losses = [nn.functional.cross_entropy(torch.cat([-c * features, c * features], 1), labels) for c in (1, 10, 1000)]
    assert float(losses[-1]) < 1e-300
    verdict, why = verdict_on(certificate, kind, None, [])
    assert verdict == "undecided"
    assert "separable" in why
    problem = HeadProblem(features, labels, nn.CrossEntropyLoss())
    bounds = HeadBounds.of(problem, solve_head(problem, tol=1e-4), kind)
    assert bounds.separated
    assert verdict_on(certificate, kind, bounds, [])[0] == "certified"
    assert verdict_on(certificate, kind, bounds, ["weight decay"])[0] == "undecided"


def test_inseparable_features_of_a_narrow_head_are_refuted_by_duality():
    features, labels = two_clusters()
    labels = labels.roll(1) * (torch.arange(len(labels)) % 3 == 0) + labels * (torch.arange(len(labels)) % 3 > 0)
    loss_fn = nn.CrossEntropyLoss()
    problem = HeadProblem(features, labels, loss_fn)
    solution = solve_head(problem, tol=1e-6)
    bounds = HeadBounds.of(problem, solution, where_attained(loss_kind(loss_fn), labels))
    certificate = certify_expressivity(features, method="alignment", targets=labels)
    assert not bounds.separated
    assert verdict_on(certificate, "hard labels", bounds, [])[0] == "refuted"
    # Naive search: no head on a grid comes below the bound.
    grid = torch.linspace(-20, 20, 201, dtype=torch.float64)
    logits = grid[:, None, None] * features[:, 0] + grid[None, :, None]
    signs = 2.0 * labels - 1
    assert float(nn.functional.softplus(-signs * logits).mean(-1).min()) >= bounds.lower > 0.1


def test_two_equal_samples_with_equal_targets_refute_nothing():
    features = torch.eye(6, dtype=torch.float64)
    features[3] = features[1]
    targets = torch.arange(6.0)[:, None]
    targets[3] = targets[1]
    certificate = certify_expressivity(features)
    assert certificate.verdict == "refuted"  # rank n
    columns = torch.cat([features, torch.ones(6, 1)], 1).double()
    best = columns @ torch.linalg.lstsq(columns, targets.double(), driver="gelsd").solution - targets
    assert float(best.norm()) < 1e-12  # and still every target is reached
    verdict, why = verdict_on(certificate, "distance", None, [])
    assert verdict == "undecided"
    assert "depends on the targets" in why


def test_targets_in_the_range_prove_nothing_for_soft_labels():
    """q is in the range of [h, 1] and log q is not: the least cross-entropy over heads stays above the entropy of q."""
    q = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    targets = torch.stack([q, 1 - q], 1)
    features = q[:, None]
    certificate = certify_expressivity(features, method="alignment", targets=targets)
    assert certificate.verdict == "certified"
    loss_fn = nn.CrossEntropyLoss()
    kind = where_attained(loss_kind(loss_fn), targets)
    assert verdict_on(certificate, kind, None, [])[0] == "undecided"
    problem = HeadProblem(features, targets, loss_fn)
    solution = solve_head(problem, tol=1e-9)
    assert solution.loss.lower > solution.infimum.upper + 1e-4
    assert verdict_on(certificate, kind, HeadBounds.of(problem, solution, kind), [])[0] == "refuted"


def test_rank_n_proves_the_claim_for_every_loss_whichever_method_found_it():
    features = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    certificate = certify_expressivity(features, method="alignment", targets=torch.rand(5, 2).double() + 0.1)
    assert certificate.rank_lower == 5
    assert verdict_on(certificate, "other", None, [])[0] == "certified"


@pytest.mark.parametrize(
    ("loss_fn", "targets", "kind"),
    [
        (nn.MSELoss(), torch.rand(4, 2), "distance"),
        (nn.L1Loss(), torch.rand(4), "distance"),
        (nn.CrossEntropyLoss(), torch.tensor([0, 1]), "hard labels"),
        (nn.CrossEntropyLoss(weight=torch.ones(2)), torch.tensor([0, 1]), "hard labels"),
        (nn.CrossEntropyLoss(), torch.eye(2), "hard labels"),
        (nn.CrossEntropyLoss(), torch.full((2, 2), 0.5), "other"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([0, 1]), "other"),
        (nn.CrossEntropyLoss(), torch.tensor([0, -100]), "other"),
        (nn.BCEWithLogitsLoss(), torch.eye(2), "other"),
        (lambda u, y: u.sum(), torch.rand(4), "other"),
        (None, torch.rand(4), "other"),
    ],
)
def test_the_kind_of_a_loss(loss_fn, targets, kind):
    assert where_attained(loss_kind(loss_fn), targets) == kind


@pytest.mark.parametrize("name", ["absolute", "Huber"])
def test_losses_with_their_infimum_at_the_targets_alone_are_refuted_by_what_is_out_of_reach(name):
    """The least loss over heads, by a grid: positive."""
    features, labels = two_clusters(12)
    targets = labels[:, None].double()
    loss_fn = {"absolute": nn.L1Loss(), "Huber": nn.HuberLoss(delta=0.1)}[name]
    certificate = certify_expressivity(features, method="alignment", targets=targets)
    assert verdict_on(certificate, where_attained(loss_kind(loss_fn), targets), None, [])[0] == "refuted"
    grid = torch.linspace(-2, 2, 161, dtype=torch.float64)
    outputs = grid[:, None, None] * features[:, 0] + grid[None, :, None]
    losses = [loss_fn(each, targets[:, 0]) for each in outputs.flatten(0, 1)]
    assert min(map(float, losses)) > 1e-4


def test_a_run_whose_narrow_head_separates_the_classes_is_certified(run, two_classes):
    guard = ExpressivityGuard(switch_at=SWITCH, method="alignment", tol=1e-4)
    run(guard, two_classes, width=60)
    assert guard.certificate.verdict == "refuted"
    assert guard.certificate.residual.lower > 0
    assert (guard.phase, guard.verdict) == (2, "certified")
    assert "separates the classes" in guard.reason
    other = ExpressivityGuard()
    other.load_state_dict(guard.state_dict())
    assert other.verdict == "certified"
    assert other._state == guard._state


def test_a_narrow_head_that_is_solved_and_separates_the_classes_is_certified(run, two_classes):
    guard = ExpressivityGuard(switch_at=SWITCH, method="alignment", step_rule="solve", tol=1e-4)
    run(guard, two_classes, width=60)
    assert guard.verdict == "certified"


def test_a_bound_over_bounded_heads_says_so(monkeypatch, run, make_loader):
    """Without a proven sigma_min the dual bound is about heads up to a norm: not about all, and the reason says which."""
    import lightning_conv.last_layer.dual as room

    monkeypatch.setattr(room, "gram_sigma_min", lambda gram: type("", (), {"lower": 0.0}))
    guard = ExpressivityGuard(switch_at=SWITCH, method="alignment", tol=1e-3)
    targets = nn.functional.one_hot(make_loader().dataset.tensors[1], 10).float()
    run(guard, TensorDataset(make_loader().dataset.tensors[0], targets), nn.MSELoss(), width=20)
    assert re.search(r"at least [\d.e-]+ \(heads with \|W\|_F <= [\d.e+]+\) and at most", guard.reason)
    assert guard._state.bounds.lower == -math.inf


def test_a_narrow_head_under_cross_entropy_is_not_refuted_before_anything_is_proven(run, make_loader):
    guard = ExpressivityGuard(switch_at=SWITCH)
    with pytest.warns(UserWarning, match="too narrow"):
        run(guard, make_loader().dataset, width=20)
    assert (guard.phase, guard.verdict) == (1, "undecided")


def test_a_bias_that_is_not_trained_is_taken_off_the_targets(run, make_loader):
    """Constant targets that only the fixed bias reaches: rho would be positive without it."""
    inputs = make_loader().dataset.tensors[0]

    def fix(module):
        with torch.no_grad():
            module.classifier.bias.fill_(0.5)
        module.classifier.bias.requires_grad_(False)

    guard = ExpressivityGuard(switch_at=SWITCH, method="alignment")
    near = torch.full((96, 10), 0.5)
    near[:, 0] += 0.25
    module = run(guard, TensorDataset(inputs, near), nn.MSELoss(), width=20, change=fix)
    with torch.no_grad():
        hidden = module.double().eval().trunk(inputs.double())
    rest = near.double() - 0.5
    solution = torch.linalg.lstsq(hidden, rest, driver="gelsd").solution
    expected = float((rest - hidden @ solution).norm() / rest.norm())
    assert guard.certificate.residual.value == pytest.approx(expected, rel=1e-5)


def test_equal_samples_do_not_wait_for_the_last_chance_when_the_run_is_to_continue(run, make_loader, monkeypatch):
    """What no weights can change is not certified anew at every step."""
    import lightning_conv.callbacks.guard.certify.attempt as room

    inputs, labels = (tensor.clone() for tensor in make_loader().dataset.tensors)
    inputs[50] = inputs[3]
    tries = []
    certify = room.certify_trunk
    monkeypatch.setattr(room, "certify_trunk", lambda *args: tries.append(1) or certify(*args))
    guard = ExpressivityGuard(
        switch_at="auto", on_undecided="continue", plateau_threshold=1.0 - 1e-9, plateau_patience=1, plateau_window=3
    )
    run(guard, TensorDataset(inputs, labels))
    assert guard.phase == 2
    assert len(tries) == 1
    assert guard.verdict == "undecided"
    assert math.isfinite(guard.history[-1]["loss"])


def test_an_infimum_above_the_loss_is_said_and_nothing_is_certified(run, make_loader):
    guard = ExpressivityGuard(switch_at=SWITCH, infimum=50.0)
    with pytest.warns(UserWarning, match="infimum: 50 is above the loss"):
        run(guard, make_loader().dataset)
    assert guard.verdict == "undecided"
    assert any("infimum: 50" in caveat for caveat in guard.caveats)


@pytest.mark.parametrize("returned", [math.nan, math.inf, None, "0"], ids=str)
def test_a_function_infimum_that_returns_no_finite_number_is_refused_by_name(run, make_loader, returned):
    with pytest.raises(MisconfigurationException, match=r"infimum: the function returned .* must return"):
        run(ExpressivityGuard(switch_at=SWITCH, infimum=lambda targets: returned), make_loader().dataset)
