"""Solved heads against closed forms, scipy and scikit-learn, and their gaps against mpmath."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightning_conv.last_layer import HeadDual, HeadProblem, SingularError, solve_head
from lightning_conv.last_layer.iterations import conjugate_gradients, lbfgs

CLASSES = 4


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def augmented(features):
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def targets_of(kind, n):
    labels = torch.arange(n) * 7 % CLASSES
    one_hot = F.one_hot(labels, CLASSES).double()
    return {
        "hard": labels,
        "values": normal(n, CLASSES, seed=3),
        "soft": 0.8 * one_hot + 0.2 / CLASSES,
        "probabilities": 0.8 * one_hot + 0.1,
        "bits": one_hot,
    }[kind]


LOSSES = {
    "mse": (nn.MSELoss(), "values"),
    "mse, sum": (nn.MSELoss(reduction="sum"), "values"),
    "huber": (nn.HuberLoss(delta=0.5), "values"),
    "smooth l1": (nn.SmoothL1Loss(beta=0.5), "values"),
    "cross-entropy": (nn.CrossEntropyLoss(), "hard"),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), "hard"),
    "soft": (nn.CrossEntropyLoss(), "soft"),
    "class weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0])), "hard"),
    "binary": (nn.BCEWithLogitsLoss(), "bits"),
    "binary, soft": (nn.BCEWithLogitsLoss(), "probabilities"),
}


def problem_of(case, features, **options):
    loss_fn, kind = LOSSES[case]
    samples = len(features) if isinstance(features, torch.Tensor) else features.samples
    return HeadProblem(features, targets_of(kind, samples), loss_fn, outputs=CLASSES, **options)


def wide():
    return normal(25, 40, seed=1)


def narrow():
    return normal(60, 5, seed=2)


def scipy_minimum(problem):
    """Compute the minimum over W by scipy's BFGS with autograd's gradients, then polish it."""

    def function(flat):
        loss, gradient = problem.loss_and_gradient(torch.from_numpy(flat).reshape(problem.columns, -1))
        return loss, gradient.numpy().ravel()

    start = np.zeros(problem.columns * problem.outputs_each)
    found = minimize(function, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    return found.fun


# --- rank n: the infimum over all outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "cholesky", "lbfgs"])
@pytest.mark.parametrize("case", LOSSES)
def test_with_rank_n_the_gap_to_the_infimum_of_the_loss_is_certified(case, method):
    problem = problem_of(case, wide())
    solution = solve_head(problem, tol=1e-6, method=method)
    assert solution.verdict == "certified", solution.reason
    assert "over all outputs" in solution.reason
    loss_fn, kind = LOSSES[case]
    weight, bias = solution.layer()
    assert weight.dtype == torch.float32
    outputs = F.linear(wide(), weight.double(), bias.double())
    loss = loss_fn.double()(outputs, targets_of(kind, 25)) / (25 if loss_fn.reduction == "sum" else 1)
    assert float(loss) - problem.infimum.value <= 1e-6
    assert solution.rounded_gap.lower <= float(loss) - problem.infimum.value + 1e-13
    assert solution.rounded_gap.upper >= float(loss) - problem.infimum.value - 1e-13


def test_squared_loss_is_solved_by_the_change_of_least_norm():
    start = (normal(CLASSES, 40, seed=8), normal(CLASSES, seed=9))
    problem = problem_of("mse", wide())
    matrix, w = augmented(wide()), problem.stack(*start)
    expected = w + torch.linalg.pinv(matrix) @ (targets_of("values", 25) - matrix @ w)
    for method in ("cholesky", "cg"):
        solution = solve_head(problem, start=start, method=method, tol=1e-14, dtype=torch.float64)
        torch.testing.assert_close(problem.stack(solution.weight, solution.bias), expected, rtol=1e-6, atol=1e-6)
        assert solution.distance == pytest.approx(float((expected - w).norm()), rel=1e-6)


def test_a_start_that_is_good_enough_is_left_alone():
    problem = problem_of("mse", wide())
    first = solve_head(problem)
    again = solve_head(problem, start=(first.weight, first.bias))
    assert (again.method, again.distance, again.verdict) == ("none needed", 0.0, "certified")
    assert torch.equal(again.weight, first.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gap_after_rounding_is_that_of_the_rounded_layer(dtype):
    problem = problem_of("mse", wide())
    solution = solve_head(problem, dtype=dtype, tol=1e-3)
    weight, bias = solution.layer()
    exact = F.mse_loss(F.linear(wide(), weight.double(), bias.double()), targets_of("values", 25))
    assert solution.rounded_gap.lower <= float(exact) <= solution.rounded_gap.upper
    assert solution.gap.upper <= 1e-20
    if dtype == torch.bfloat16:
        assert solution.rounded_gap.value > 1e-9


@pytest.mark.parametrize("case", ["cross-entropy", "label smoothing", "mse", "binary, soft"])
def test_the_certified_gap_holds_the_one_computed_in_mpmath(case):
    features = normal(6, 8, seed=4)
    problem = problem_of(case, features)
    solution = solve_head(problem, tol=1e-5)
    weight, bias = solution.layer()
    kind = LOSSES[case][1]
    with mpmath.workdps(50):
        loss = infimum = mpmath.mpf(0)
        for x, y in zip(features.tolist(), targets_of(kind, 6).tolist(), strict=True):
            u = [
                mpmath.fsum(mpmath.mpf(a) * mpmath.mpf(b) for a, b in zip(x, row, strict=True)) + mpmath.mpf(c)
                for row, c in zip(weight.double().tolist(), bias.double().tolist(), strict=True)
            ]
            if case == "mse":
                loss += mpmath.fsum((a - mpmath.mpf(b)) ** 2 for a, b in zip(u, y, strict=True)) / CLASSES
            elif case == "binary, soft":
                for a, t in zip(u, (mpmath.mpf(t) for t in y), strict=True):
                    loss += (mpmath.log(1 + mpmath.exp(a)) - t * a) / CLASSES
                    infimum -= (t * mpmath.log(t) + (1 - t) * mpmath.log(1 - t)) / CLASSES
            else:
                smoothing = mpmath.mpf(0.1) if case == "label smoothing" else mpmath.mpf(0)
                q = [(1 - smoothing) * int(c == y) + smoothing / CLASSES for c in range(CLASSES)]
                log_sum = mpmath.log(mpmath.fsum(mpmath.exp(a) for a in u))
                loss += mpmath.fsum(p * (log_sum - a) for p, a in zip(q, u, strict=True))
                infimum -= mpmath.fsum(p * mpmath.log(p) for p in q if p)
        gap = (loss - infimum) / 6
        assert mpmath.mpf(solution.rounded_gap.lower) <= gap <= mpmath.mpf(solution.rounded_gap.upper)
    assert solution.rounded_gap.upper - solution.rounded_gap.lower <= 1e-12


# --- narrow heads: the infimum over heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", LOSSES)
def test_the_dual_bound_is_below_the_minimum_that_scipy_finds_and_close(case, bias):
    problem = problem_of(case, narrow(), bias=bias)
    minimum = scipy_minimum(problem)
    assert minimum > problem.infimum.value + 1e-3  # no head reaches the infimum of the loss
    solution = solve_head(problem, tol=1e-7)
    assert solution.verdict == "certified", solution.reason
    assert "over heads" in solution.reason
    bound = solution.head_infimum
    assert math.isinf(bound.radius)  # over all heads, not over a ball
    assert bound.lower <= minimum + 1e-13
    assert bound.lower >= minimum - 1e-7
    assert solution.loss.value <= minimum + 1e-7
    assert 0 <= solution.rounded_loss.value - minimum + 1e-13 <= solution.rounded_head_gap.upper + 1e-12


@pytest.mark.parametrize("case", LOSSES)
def test_the_dual_bound_holds_far_from_the_minimiser_too(case):
    problem = problem_of(case, narrow())
    minimum = scipy_minimum(problem)
    dual = HeadDual(problem)
    for seed in range(5):
        bound = dual.bound(0.3 * normal(6, CLASSES, seed=seed))
        assert bound.lower <= minimum + 1e-13


def test_a_fixed_bias_counts_in_the_dual_bound():
    offset = torch.tensor([0.5, -1.0, 0.25, 2.0], dtype=torch.float64)
    for case in ("mse", "cross-entropy"):
        problem = problem_of(case, narrow(), bias=False, fixed_bias=offset)
        solution = solve_head(problem, tol=1e-7)
        assert solution.verdict == "certified"
        assert solution.head_infimum.lower <= scipy_minimum(problem) + 1e-13


def test_least_squares_is_numpys():
    problem = problem_of("mse", narrow())
    expected = np.linalg.lstsq(augmented(narrow()).numpy(), targets_of("values", 60).numpy(), rcond=None)[0]
    solution = solve_head(problem)
    np.testing.assert_allclose(problem.stack(solution.weight, solution.bias).numpy(), expected, rtol=1e-9, atol=1e-12)
    # Conjugate gradients reach the least-squares solution.
    iterate = list(zip(range(60), conjugate_gradients(problem, problem.zeros()), strict=False))[-1][1]
    np.testing.assert_allclose(iterate.w.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_logistic_regression_is_scikit_learns():
    images, labels = load_digits(n_class=4, return_X_y=True)
    features = torch.tensor(images[:200, 20:26] / 16)
    problem = HeadProblem(features, torch.tensor(labels[:200]), nn.CrossEntropyLoss())
    solution = solve_head(problem, tol=1e-8)
    assert solution.verdict == "certified", solution.reason
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=20_000).fit(features.numpy(), labels[:200])
    ours = torch.softmax(features @ solution.weight.T + solution.bias, 1)
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba(features.numpy()), atol=2e-3)
    loss = -float(
        torch.tensor(theirs.predict_log_proba(features.numpy())).gather(1, torch.tensor(labels[:200])[:, None]).mean()
    )
    assert solution.head_infimum.lower <= loss


def test_contradicting_labels_of_equal_samples_are_a_head_that_cannot_reach_everything():
    features = wide()
    features[1] = features[0]  # labels 0 and 3
    problem = problem_of("cross-entropy", features)
    solution = solve_head(problem, tol=1e-5)
    # The two of them cost log 2 each at best.
    best = 2 * math.log(2) / 25
    assert best <= solution.loss.value <= best + 1e-5
    assert solution.verdict == "certified", solution.reason
    assert solution.head_infimum.lower <= best
    assert solution.head_infimum.lower >= best - 1e-5
    assert math.isfinite(solution.head_infimum.radius)  # the rank is not proven, so the bound is about a ball
    assert "|W|_F <=" in solution.reason
    with pytest.raises(SingularError):
        solve_head(problem, method="cholesky")
    squared = solve_head(problem_of("mse", features))
    assert (squared.method, squared.verdict) == ("cg", "certified")
    assert squared.iterations < 100
    gap = targets_of("values", 25)[:2].sub(targets_of("values", 25)[:2].mean(0)).square().sum() / 100
    assert squared.loss.value == pytest.approx(float(gap), rel=1e-6)


# --- methods ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mse", "cross-entropy", "label smoothing"])
@pytest.mark.parametrize("shape", ["wide", "narrow"])
def test_streamed_features_give_the_same_solution(case, shape):
    features = {"wide": normal(300, 400, seed=1), "narrow": normal(300, 8, seed=2)}[shape]

    class Rows:
        samples, width = features.shape

        def rows(self, start, stop):
            assert stop - start < 300
            return features[start:stop]

    # Less than two times the features, so that they cannot be held.
    memory = {"wide": 1_900_000, "narrow": 37_000}[shape]
    streamed = problem_of(case, Rows(), max_memory=memory)
    assert not streamed.held
    one, two = solve_head(streamed), solve_head(problem_of(case, features))
    assert one.verdict == two.verdict == "certified", one.reason
    assert one.method == two.method
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-4, atol=1e-6)


def test_conjugate_gradients_take_over_where_the_matrix_does_not_fit():
    features = normal(120, 150, seed=1)

    class Rows:
        samples, width = features.shape

        def rows(self, start, stop):
            return features[start:stop]

    solution = solve_head(problem_of("mse", Rows(), max_memory=120_000), tol=1e-4)
    assert (solution.method, solution.verdict) == ("cg", "certified")
    assert "max_memory" not in solution.reason


def test_the_loss_of_lbfgs_never_rises_and_passes_are_counted():
    problem = problem_of("cross-entropy", wide())
    calls = 0
    original = problem.loss_and_gradient

    def counted(w):
        nonlocal calls
        calls += 1
        return original(w)

    problem.loss_and_gradient = counted
    iterates = [found for _, found in zip(range(40), lbfgs(problem, problem.zeros()), strict=False)]
    assert all(after.loss <= before.loss for before, after in itertools.pairwise(iterates))
    assert iterates[-1].count == calls <= 1.5 * len(iterates)


def test_the_callers_own_loss_is_minimised_and_its_word_not_certified():
    def log_cosh(outputs, targets):
        return torch.log(torch.cosh(outputs - targets)).sum(1)

    targets = targets_of("values", 25)
    solution = solve_head(HeadProblem(wide(), targets, log_cosh, infimum=0.0))
    assert solution.verdict == "undecided"
    assert "numbers given by the caller" in solution.reason
    assert solution.gap.value <= 1e-6
    unknown = solve_head(HeadProblem(wide(), targets, log_cosh))
    assert (unknown.gap, unknown.verdict) == (None, "undecided")
    assert "pass infimum=" in unknown.reason
    assert unknown.loss.value <= 1e-10


def test_what_does_not_get_there_says_so():
    solution = solve_head(problem_of("mse", wide()), method="lbfgs", max_iterations=3)
    assert solution.verdict == "undecided"
    assert "3 iterations" in solution.reason
    assert solution.loss.value < float(targets_of("values", 25).square().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol: 0.0"),
        ({"method": "newton"}, "method: 'newton'"),
        ({"method": "cg"}, "squared loss"),
        ({"dtype": torch.int64}, "dtype"),
        ({"start": (torch.zeros(2, 2), torch.zeros(2))}, "weight: shape"),
        ({"start": (torch.zeros(CLASSES, 40), None)}, "bias: None"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        solve_head(problem_of("cross-entropy", wide()), **options)


def test_the_start_and_the_features_are_left_alone():
    features, start = wide(), (normal(CLASSES, 40, seed=8), normal(CLASSES, seed=9))
    before = [tensor.clone() for tensor in (features, *start)]
    state = torch.get_rng_state()
    solve_head(problem_of("cross-entropy", features), start=start)
    assert all(torch.equal(a, b) for a, b in zip((features, *start), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
