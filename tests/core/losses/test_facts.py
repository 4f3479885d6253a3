"""Infima against minimisation, smoothness against Hessians."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_conv.losses.facts import curvature, loss_facts


def soft(n, c):
    return torch.softmax(torch.randn(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1)


HARD = torch.tensor([0, 2, 1, 1])
CASES = {
    "mse": (nn.MSELoss(), torch.randn(4, 3, dtype=torch.float64)),
    "huber": (nn.HuberLoss(delta=0.7), torch.randn(4, 3, dtype=torch.float64)),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), torch.randn(4, 3, dtype=torch.float64)),
    "cross-entropy": (nn.CrossEntropyLoss(), HARD),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), HARD),
    "soft targets": (nn.CrossEntropyLoss(), soft(4, 3)),
    "soft targets, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), soft(4, 3)),
    "targets that do not sum to one": (nn.CrossEntropyLoss(), 1.7 * soft(4, 3)),
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)), HARD),
    "mse, sum": (nn.MSELoss(reduction="sum"), torch.randn(4, 3, dtype=torch.float64)),
    "class weights, sum": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64), reduction="sum"),
        HARD,
    ),
    "binary, sum": (nn.BCEWithLogitsLoss(reduction="sum"), torch.rand(4, 3, dtype=torch.float64)),
    "binary": (nn.BCEWithLogitsLoss(), torch.rand(4, 3, dtype=torch.float64)),
    "binary, hard": (nn.BCEWithLogitsLoss(), torch.randint(0, 2, (4, 3)).double()),
}


def mean_over_samples(loss_fn, outputs, targets):
    """What the facts are about: a sum is divided by n."""
    return loss_fn(outputs, targets) / (4 if loss_fn.reduction == "sum" else 1)


def minimum(loss_fn, targets):
    """By L-BFGS from zero, for losses that attain it; by a long way towards the targets where they do not."""
    outputs = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [outputs], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(outputs, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(mean_over_samples(loss_fn, outputs, targets).detach())


@pytest.mark.parametrize("case", CASES)
def test_the_infimum_is_what_minimisation_finds(case):
    loss_fn, targets = CASES[case]
    facts = loss_facts(loss_fn, torch.zeros(4, 3), targets)
    found = minimum(loss_fn, targets)
    assert found >= facts.infimum - 1e-12
    assert found == pytest.approx(facts.infimum, abs=1e-5)
    if facts.attained:
        assert found == pytest.approx(facts.infimum, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_smoothness_bounds_every_hessian(case):
    loss_fn, targets = CASES[case]
    smoothness = loss_facts(loss_fn, torch.zeros(4, 3), targets).smoothness
    largest = 0.0
    for seed in range(30):
        outputs = 3 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        if seed == 0:
            outputs = torch.zeros(4, 3, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda u: mean_over_samples(loss_fn, u, targets), outputs).reshape(
            12, 12
        )
        largest = max(largest, 4 * float(torch.linalg.eigvalsh(hessian)[-1]))  # n times that of the mean
    assert largest <= smoothness * (1 + 1e-9)
    assert largest >= 0.2 * smoothness  # and is no wild overestimate


def test_the_constant_of_cross_entropy_is_sharp():
    facts = loss_facts(nn.CrossEntropyLoss(), torch.zeros(1, 2), torch.tensor([0]))
    hessian = torch.autograd.functional.hessian(
        lambda u: F.cross_entropy(u, torch.tensor([0])), torch.zeros(1, 2).double()
    )
    assert float(torch.linalg.eigvalsh(hessian.reshape(2, 2))[-1]) == pytest.approx(facts.smoothness)


class Mine(nn.MSELoss):
    pass


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (Mine(), torch.zeros(4, 3)),
        (nn.CrossEntropyLoss(ignore_index=2), HARD),
        (lambda u, y: u.sum(), HARD),
        (nn.CrossEntropyLoss(weight=torch.ones(3), label_smoothing=0.1), HARD),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), torch.zeros(4, 3)),
        (nn.BCEWithLogitsLoss(), 2 * torch.ones(4, 3)),
    ],
)
def test_what_is_not_known_is_none(loss_fn, targets):
    assert loss_facts(loss_fn, torch.zeros(4, 3), targets) is None


def test_absolute_error_is_not_smooth():
    facts = loss_facts(nn.L1Loss(), torch.zeros(4, 3), torch.zeros(4, 3))
    assert (facts.infimum, facts.smoothness) == (0.0, None)


@pytest.mark.parametrize("case", ["mse", "cross-entropy", "soft targets", "binary"])
def test_gradient_descent_with_the_largest_proven_step_obeys_the_bound(case):
    """L(w_t) - L* <= L_H R^2 / (2 t) at every step, on features of full rank."""
    loss_fn, targets = CASES[case]
    features = torch.cat(
        [torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), torch.ones(4, 1)], 1
    ).double()
    facts = loss_facts(loss_fn, torch.zeros(4, 3), targets)
    l_h = curvature(facts.smoothness, float(torch.linalg.matrix_norm(features, 2)), 4)
    if case == "mse":
        goal = targets
    elif facts.attained:
        goal = targets.log() if case == "soft targets" else torch.logit(targets)
    else:
        pytest.skip("the infimum is not attained, so R is infinite")
    radius = float((torch.linalg.pinv(features) @ goal).norm())
    weights = torch.zeros(7, 3, dtype=torch.float64, requires_grad=True)
    for step in range(1, 200):
        (gradient,) = torch.autograd.grad(loss_fn(features @ weights, targets), weights)
        weights = (weights - gradient / l_h).detach().requires_grad_()
        gap = float(loss_fn(features @ weights, targets)) - facts.infimum
        assert gap <= l_h * radius**2 / (2 * step) * (1 + 1e-12)
