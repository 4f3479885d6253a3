"""The bounds of phase 2 on real digits at every step, and their failure where an assumption is violated."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lightning_conv.last_layer import (
    Comparator,
    HeadProblem,
    PowerSchedule,
    batch_curvature,
    comparator,
    comparators,
    gradient_bound,
    gradient_descent_bound,
    gradient_descent_steps,
    head_curvature,
    least_change,
    linear_bound,
    sgd_bound,
    sgd_interpolation_bound,
    sigma_max,
    sigma_min,
    solve_head,
)
from lightning_conv.last_layer.sigma import trace_bound

N, WIDTH, CLASSES = 120, 140, 10
ROUNDING = 1 + 1e-12


def digits(count=N):
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:count] / 16).double(), torch.tensor(labels[:count])


def wide_features(images, width=WIDTH, seed=0):
    """A random softplus layer: rank n almost surely."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(images.shape[1], width, dtype=torch.float64, generator=generator) / 8
    return F.softplus(images @ weight, beta=20)


def trained_features():
    """The last hidden layer of a network after some steps of training on all its weights."""
    images, labels = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = nn.Sequential(
            nn.Linear(64, 32), nn.Softplus(beta=20), nn.Linear(32, WIDTH), nn.Softplus(beta=20)
        ).double()
        head = nn.Linear(WIDTH, CLASSES).double()
    optimizer = torch.optim.Adam([*trunk.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(head(trunk(images)), labels).backward()
        optimizer.step()
    return trunk(images).detach(), torch.cat([head.weight.T, head.bias[None]]).detach()


FEATURES = wide_features(digits()[0])
LABELS = digits()[1]
ONE_HOT = F.one_hot(LABELS, CLASSES).double()
LOSSES = {
    "mse": (nn.MSELoss(), ONE_HOT),
    "mse, sum": (nn.MSELoss(reduction="sum"), ONE_HOT),
    "huber": (nn.HuberLoss(delta=0.3), ONE_HOT),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), ONE_HOT),
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "soft": (nn.CrossEntropyLoss(), torch.softmax(4 * ONE_HOT, 1)),
    "class weights": (nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10)), LABELS),
    "binary": (nn.BCEWithLogitsLoss(), ONE_HOT),
    "binary, soft": (nn.BCEWithLogitsLoss(), 0.8 * ONE_HOT + 0.1),
}


def problem_of(case, features=FEATURES, **options):
    loss_fn, targets = LOSSES[case]
    return HeadProblem(features, targets, loss_fn, outputs=CLASSES, **options)


def descend(problem, step, count, start=None):
    """Return the gaps L(w_t) - L*, t = 0, ..., count, of gradient descent."""
    w, gaps = problem.zeros() if start is None else start, []
    for _ in range(count):
        loss, gradient = problem.loss_and_gradient(w)
        gaps.append(loss - problem.infimum.value)
        w = w - step * gradient
    return [*gaps, problem.loss_and_gradient(w)[0] - problem.infimum.value]


# --- steps ------------------------------------------------------------------------------------------------------------


def augmented(features, bias=True):
    return torch.cat([features, torch.ones(len(features), 1)], 1).double() if bias else features


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (1, 5), (5, 1)])
@pytest.mark.parametrize("kind", ["positive", "centred", "equal"])
def test_sigma_max_and_min_lie_between_their_bounds(shape, bias, kind, exact_singular_values):
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = {"positive": matrix.abs(), "centred": matrix, "equal": torch.eye(*shape, dtype=torch.float64)}[kind]
    problem = HeadProblem(matrix, torch.zeros(shape[0]), nn.MSELoss(), bias=bias)
    exact = exact_singular_values(augmented(matrix, bias))
    largest = sigma_max(problem)
    assert largest.certified
    assert largest.lower <= exact[0] <= largest.upper
    assert largest.upper <= float(exact[0]) * 1.002
    smallest = sigma_min(problem)
    assert smallest.lower <= exact[-1] <= smallest.upper


def test_the_trace_bound_holds_for_any_orthonormal_columns():
    problem = problem_of("mse")
    exact = float(torch.linalg.svdvals(augmented(FEATURES))[0])
    for seed in range(20):
        start = torch.randn(WIDTH + 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        bound = trace_bound(problem, torch.linalg.qr(start)[0])
        assert bound.lower <= exact <= bound.upper


def test_a_stream_has_the_held_step():
    class Rows:
        samples, width = FEATURES.shape

        def rows(self, start, stop):
            return FEATURES[start:stop]

    streamed = problem_of("cross-entropy", Rows(), max_memory=130_000)
    assert not streamed.held
    one, two = head_curvature(streamed), head_curvature(problem_of("cross-entropy"))
    assert one.value.lower <= two.value.upper
    assert two.value.lower <= one.value.upper
    assert one.step == pytest.approx(two.step, rel=5e-3)


@pytest.mark.parametrize("case", LOSSES)
def test_the_curvature_bounds_every_change_of_the_gradient(case):
    problem = problem_of(case)
    curvature = head_curvature(problem).value.upper
    largest = 0.0
    generator = torch.Generator().manual_seed(0)
    top = torch.linalg.svd(augmented(FEATURES))[2][0]
    for trial in range(20):
        size = 10.0 ** (-trial % 4 - 2)
        w = 0.02 * torch.randn(WIDTH + 1, CLASSES, dtype=torch.float64, generator=generator)
        direction = top[:, None] * torch.randn(1, CLASSES, dtype=torch.float64, generator=generator)
        v = w + size * direction / direction.norm()
        change = problem.loss_and_gradient(v)[1] - problem.loss_and_gradient(w)[1]
        largest = max(largest, float(change.norm() / (v - w).norm()))
    assert largest <= curvature * (1 + 1e-9)
    # Cross-entropy reaches its constant only for two classes at p = 1/2, the others for their worst sample.
    assert largest >= 0.05 * curvature


@pytest.mark.parametrize("batch", [1, 7, 32, N])
def test_the_batch_curvature_bounds_that_of_every_batch(batch):
    problem = problem_of("cross-entropy")
    full = head_curvature(problem)
    bound = batch_curvature(problem, batch, full)
    assert bound <= batch_curvature(problem, batch)
    generator = torch.Generator().manual_seed(0)
    matrix = augmented(FEATURES)
    largest = max(
        float(torch.linalg.matrix_norm(matrix[torch.randperm(N, generator=generator)[:batch]], 2)) ** 2 * 0.5 / batch
        for _ in range(50)
    )
    assert largest <= bound
    assert bound <= 2 * largest
    if batch == N:
        assert bound == pytest.approx(full.value.value, rel=2e-3)


@pytest.mark.parametrize("case", ["cross-entropy", "label smoothing", "soft", "class weights", "binary"])
def test_the_gradient_bound_holds_for_every_sample_and_weight(case):
    problem = problem_of(case)
    bound = gradient_bound(problem)
    largest = 0.0
    for seed in range(20):
        w = 10 * torch.randn(WIDTH + 1, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        by_outputs = problem.losses.gradients(problem.outputs(w), slice(0, N))[1]
        largest = max(largest, float((by_outputs.norm(dim=1) * augmented(FEATURES).norm(dim=1)).max()))
    assert 0.3 * bound <= largest <= bound


def test_squared_losses_have_no_gradient_bound_and_absolute_error_no_step():
    with pytest.raises(ValueError, match="sgd_interpolation_bound"):
        gradient_bound(problem_of("mse"))
    with pytest.raises(ValueError, match="smoothness"):
        head_curvature(HeadProblem(FEATURES, ONE_HOT, nn.L1Loss()))
    with pytest.raises(ValueError, match="batch_size"):
        batch_curvature(problem_of("mse"), 0)


def test_the_schedule_is_what_robbins_and_monro_ask_for():
    schedule = PowerSchedule(0.3, decay=50, power=0.75)
    steps = schedule.steps(200_000)
    assert float(steps[777]) == schedule(777)
    # The sum follows its integral, which diverges. The sum of squares converges to k0 eta0^2 / (2 p - 1) plus a first step.
    for count in (1000, 200_000):
        integral = 0.3 * 50 / 0.25 * ((1 + count / 50) ** 0.25 - 1)
        assert float(steps[:count].sum()) == pytest.approx(integral, abs=0.3)
    assert float(steps.square().sum()) <= 0.3**2 * (50 / 0.5 + 1)
    for options in ({"power": 0.5}, {"power": 1.1}, {"decay": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PowerSchedule(0.1, **options)
    with pytest.raises(ValueError, match="first"):
        PowerSchedule(-1.0)


# --- gradient descent ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", LOSSES)
def test_gradient_descent_obeys_the_bound_at_every_step(case):
    problem = problem_of(case)
    step = head_curvature(problem).step
    family = comparators(problem, problem.zeros())
    for t, gap in enumerate(descend(problem, step, 1500)):
        assert gap <= gradient_descent_bound(family, step, t) * ROUNDING
        # Each comparator alone, without the lines between them.
        assert t == 0 or gap <= gradient_descent_bound(family[-1], step, t) * ROUNDING


def test_gradient_descent_obeys_the_bound_on_trained_features():
    features, start = trained_features()
    problem = problem_of("cross-entropy", features)
    step = head_curvature(problem).step
    family = comparators(problem, start)
    gaps = descend(problem, step, 1500, start)
    assert all(gap <= gradient_descent_bound(family, step, t) * ROUNDING for t, gap in enumerate(gaps))
    assert gaps[-1] < 0.9 * gaps[0]


@pytest.mark.parametrize("case", ["mse", "mse, sum"])
def test_squared_loss_falls_at_the_linear_rate_at_every_step(case):
    problem = problem_of(case, wide_features(digits()[0], 400))
    curvature = head_curvature(problem)
    smallest = sigma_min(problem)
    assert smallest.lower > 0
    least = problem.smoothness / N * smallest.lower**2
    gaps = descend(problem, curvature.step, 1500)
    assert all(gap <= linear_bound(gaps[0], curvature.step, least, t) * ROUNDING for t, gap in enumerate(gaps))


def test_the_linear_rate_is_attained_in_the_worst_direction():
    problem = problem_of("mse")
    left, values, _ = torch.linalg.svd(augmented(FEATURES))
    start = least_norm(problem, ONE_HOT + left[:, N - 1 :] * torch.ones(1, CLASSES))
    step = head_curvature(problem).step
    least = problem.smoothness / N * float(values[N - 1]) ** 2
    gaps = descend(problem, step, 300, start)
    assert gaps[300] == pytest.approx(linear_bound(gaps[0], step, least, 300), rel=1e-6)


@pytest.mark.parametrize("case", ["cross-entropy", "binary, soft", "huber"])
def test_a_narrow_head_obeys_the_bound_above_its_own_infimum(case):
    """The comparator is a solved head, and L is compared with its dual bound."""
    features = torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    problem = problem_of(case, features)
    solution = solve_head(problem, tol=1e-7, dtype=torch.float64)
    assert math.isinf(solution.head_infimum.radius)
    floor = solution.head_infimum.lower
    assert floor > problem.infimum.value + 1e-3
    best = comparator(problem, problem.zeros(), problem.stack(solution.weight, solution.bias), floor)
    assert best.excess <= 1e-7
    step = head_curvature(problem).step
    above = problem.infimum.value - floor
    for t, gap in enumerate(descend(problem, step, 500)):
        assert (
            gap + above
            <= gradient_descent_bound([comparator(problem, problem.zeros(), problem.zeros(), floor), best], step, t)
            * ROUNDING
        )


def test_squared_loss_of_a_narrow_head_falls_linearly_to_its_own_minimum():
    problem = problem_of("mse", FEATURES[:, :6])
    matrix = augmented(FEATURES[:, :6])
    minimum = float((matrix @ torch.linalg.lstsq(matrix, ONE_HOT).solution - ONE_HOT).square().mean())
    curvature, smallest = head_curvature(problem), sigma_min(problem)
    least = problem.smoothness / N * smallest.lower**2
    gaps = [gap - minimum for gap in descend(problem, curvature.step, 500)]
    assert all(gap <= linear_bound(gaps[0], curvature.step, least, t) * ROUNDING + 1e-15 for t, gap in enumerate(gaps))


def least_norm(problem, outputs):
    with least_change(problem) as solver:
        return solver(outputs)


@pytest.mark.parametrize(("case", "factor"), [("mse", 2.2), ("huber", 2.2), ("label smoothing", 60.0)])
def test_a_step_larger_than_allowed_breaks_the_bound(case, factor):
    """The tests above can fail. At the minimiser of a smoothed cross-entropy the curvature is far below L_ell."""
    problem = problem_of(case)
    curvature = head_curvature(problem)
    top = torch.linalg.svd(augmented(FEATURES))[2][0]
    targets = LOSSES[case][1]
    goal = targets if targets.is_floating_point() else torch.log(0.9 * ONE_HOT + 0.01)
    minimiser = least_norm(problem, goal)
    start = minimiser + 1e-2 * top[:, None] * torch.tensor([1.0, -1.0] + [0.0] * 8)
    family = [comparator(problem, start, minimiser)]
    broken = {}
    for multiple in (1.0, factor):
        step = multiple * curvature.step
        gaps = descend(problem, step, 300, start)
        broken[multiple] = any(
            gap > gradient_descent_bound(family, step, t) * ROUNDING + 1e-15 for t, gap in enumerate(gaps) if t
        )
    assert broken == {1.0: False, factor: True}


def test_squared_loss_diverges_just_above_twice_the_step():
    problem = problem_of("mse")
    curvature = head_curvature(problem)
    assert descend(problem, 2.02 * curvature.step, 1500)[-1] > descend(problem, 1.98 * curvature.step, 1500)[-1]
    with pytest.raises(ValueError, match="eta mu"):
        linear_bound(1.0, 3.0 / curvature.value.lower, curvature.value.lower, 1)


def test_comparators_state_their_true_loss_and_distance():
    problem = problem_of("cross-entropy")
    start = problem.zeros()
    moved = start + 0.1
    found = comparator(problem, start, moved)
    assert found.distance == pytest.approx(0.1 * math.sqrt((WIDTH + 1) * CLASSES))
    assert found.distance >= float((moved - start).norm())
    expected = float(F.cross_entropy(augmented(FEATURES) @ moved, LABELS))
    assert expected <= found.excess <= expected * (1 + 1e-9)
    with pytest.raises(ValueError, match="infimum"):
        comparator(HeadProblem(FEATURES, ONE_HOT, lambda u, y: (u - y).abs().sum(1)), start, moved)


def test_the_family_of_comparators_comes_close_and_multiples_serve_what_is_classified():
    problem = problem_of("cross-entropy")
    family = comparators(problem, problem.zeros())
    assert family[0].distance == 0
    assert min(found.excess for found in family) <= 1.1e-9
    features, start = trained_features()
    trained = problem_of("cross-entropy", features)
    while float((augmented(features) @ start).argmax(1).eq(LABELS).double().mean()) < 1:
        start = start - 0.5 * trained.loss_and_gradient(start)[1]
    scaled = [found.distance / float(start.norm()) for found in comparators(trained, start)[1:3]]
    assert scaled == pytest.approx([0.05, 0.1], rel=1e-9)


def test_the_bound_with_the_lines_between_is_the_minimum_over_them():
    family = [Comparator(1.0, 0.0), Comparator(0.1, 3.0)]
    for steps in (1, 10, 30, 100, 1000):
        shares = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        naive = (1 - shares) + 0.1 * shares + (3 * shares) ** 2 / (2 * 0.1 * steps)
        assert gradient_descent_bound(family, 0.1, steps) == pytest.approx(float(naive.min()), rel=1e-8)


def test_the_number_of_steps_is_the_first_at_which_the_bound_is_small_enough():
    family = [Comparator(1.0, 0.0), Comparator(0.1, 3.0), Comparator(0.0, 20.0)]
    for gap in (1.0, 0.9, 0.5, 0.2, 0.05):
        steps = gradient_descent_steps(family, 0.1, gap)
        assert gradient_descent_bound(family, 0.1, steps) <= gap
        assert steps == 0 or gradient_descent_bound(family, 0.1, steps - 1) > gap
    assert gradient_descent_steps(family[:2], 0.1, 0.05) == math.inf


# --- mini-batches ---------------------------------------------------------------------------------------------------------


def stochastic(problem, steps, batch, seed):
    """Return the minimum over k of L(w_k) - L*, for k below every count of steps."""
    generator = torch.Generator().manual_seed(seed)
    w, best, trace = problem.zeros(), math.inf, []
    matrix = augmented(FEATURES)
    for step in steps.tolist():
        best = min(best, problem.loss_and_gradient(w)[0] - problem.infimum.value)
        trace.append(best)
        chosen = torch.randint(0, N, (batch,), generator=generator)
        by_outputs = problem.losses.gradients(problem.outputs(w), slice(0, N))[1]
        w = w - step * matrix[chosen].T @ by_outputs[chosen] / batch
    return torch.tensor(trace)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cross-entropy", "label smoothing"])
def test_stochastic_gradients_obey_the_bound_in_the_mean(case):
    problem = problem_of(case)
    steps = PowerSchedule(1 / batch_curvature(problem, 8), decay=100, power=0.75).steps(200)
    mean = torch.stack([stochastic(problem, steps, 8, seed) for seed in range(8)]).mean(0)
    family, steepest = comparators(problem, problem.zeros()), gradient_bound(problem)
    for count in (1, 10, 50, 200):
        assert float(mean[count - 1]) <= sgd_bound(family, steepest, steps[:count])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cross-entropy", "mse", "label smoothing"])
def test_with_rank_n_constant_steps_obey_the_faster_bound_in_the_mean(case):
    problem = problem_of(case)
    curvature = batch_curvature(problem, 8)
    steps = torch.full((200,), 0.5 / curvature, dtype=torch.float64)
    mean = torch.stack([stochastic(problem, steps, 8, seed) for seed in range(8)]).mean(0)
    family = comparators(problem, problem.zeros())
    if case == "label smoothing":
        # Not every batch reaches its infimum at the same w unless rank n: it does here.
        assert float(sigma_min(problem).lower) > 0
    for count in (1, 10, 50, 200):
        assert float(mean[count - 1]) <= sgd_interpolation_bound(family, curvature, steps[:count])


def test_the_stochastic_bounds_are_their_formulas_and_refuse_what_is_not_theirs():
    one = Comparator(0.25, 2.0)
    steps = torch.tensor([0.1, 0.05])
    assert sgd_bound(one, 3.0, steps) == pytest.approx(0.25 + (4 + 9 * 0.0125) / (2 * 0.15))
    useful = 0.1 * (1 - 0.1 * 2) + 0.05 * (1 - 0.05 * 2)
    assert sgd_interpolation_bound(one, 2.0, steps) == pytest.approx((4 + 2 * 0.25 * 0.15) / (2 * useful))
    with pytest.raises(ValueError, match="1 / L_B"):
        sgd_interpolation_bound(one, 10.0, steps)
    with pytest.raises(ValueError, match="steps"):
        sgd_bound(one, 1.0, torch.tensor([0.1, 0.0]))
    with pytest.raises(ValueError, match="comparators"):
        sgd_bound([], 1.0, steps)
    with pytest.raises(ValueError, match="comparators"):
        gradient_descent_bound([], 0.1, 1)
    with pytest.raises(ValueError, match="step"):
        gradient_descent_bound(one, -0.1, 1)
