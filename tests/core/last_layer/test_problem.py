"""The problem of the last layer: value, gradient and rounding against mpmath, autograd and finite differences; streaming."""

import itertools

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_conv.last_layer import HeadProblem, prescribed_outputs

N, WIDTH, CLASSES = 24, 9, 3


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


HARD = torch.arange(N) % CLASSES
SOFT = torch.softmax(2 * normal(N, CLASSES, seed=1), 1)
PROBABILITIES = torch.rand(N, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
VALUES = normal(N, CLASSES, seed=3)
WEIGHTS = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
SOME_ZEROS = torch.where(torch.arange(CLASSES) == HARD[:, None], 0.0, SOFT)
SOME_ZEROS = SOME_ZEROS / SOME_ZEROS.sum(1, keepdim=True)

CASES = {
    "mse": (nn.MSELoss(), VALUES),
    "mse, sum": (nn.MSELoss(reduction="sum"), VALUES),
    "huber": (nn.HuberLoss(delta=0.7), VALUES),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), VALUES),
    "absolute": (nn.L1Loss(), VALUES),
    "cross-entropy": (nn.CrossEntropyLoss(), HARD),
    "cross-entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), HARD),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), HARD),
    "soft": (nn.CrossEntropyLoss(), SOFT),
    "soft, some zero": (nn.CrossEntropyLoss(), SOME_ZEROS),
    "soft, not summing to one": (nn.CrossEntropyLoss(label_smoothing=0.1), 1.3 * SOFT),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), HARD),
    "class weights, sum": (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), HARD),
    "binary": (nn.BCEWithLogitsLoss(), PROBABILITIES),
    "binary, hard": (nn.BCEWithLogitsLoss(), (PROBABILITIES > 0.5).double()),
    "binary, sum": (nn.BCEWithLogitsLoss(reduction="sum"), PROBABILITIES),
}


class Strips:
    """Features that are only available in strips of rows."""

    def __init__(self, features, most):
        self._features, self._most = features, most
        self.samples, self.width = features.shape
        self.reads = 0

    def rows(self, start, stop):
        assert stop - start <= self._most, "asked for more than fits"
        self.reads += 1
        return self._features[start:stop].clone()


def features(width=WIDTH):
    return normal(N, width, seed=5)


def held(case, **options):
    loss_fn, targets = CASES[case]
    return HeadProblem(features(), targets, loss_fn, outputs=CLASSES, **options)


def naive(case, w, bias=True):
    """Return torch's loss of the whole set at once; a sum is divided by n."""
    loss_fn, targets = CASES[case]
    h = features()
    outputs = (torch.cat([h, torch.ones(N, 1)], 1) if bias else h) @ w
    loss = loss_fn(outputs, targets)
    return loss / N if loss_fn.reduction == "sum" else loss


def some_w(problem, seed=7):
    return normal(problem.columns, problem.outputs_each, seed=seed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_are_torchs(case, bias):
    problem = held(case, bias=bias)
    w = some_w(problem).requires_grad_()
    expected = naive(case, w, bias)
    (gradient,) = torch.autograd.grad(expected, w)
    loss, found = problem.loss_and_gradient(w.detach())
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    assert problem.value(w.detach()).value == loss
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [case for case in CASES if case != "absolute"])
def test_gradient_agrees_with_finite_differences(case):
    problem = held(case)
    w, step = some_w(problem), 1e-5
    gradient = problem.loss_and_gradient(w)[1]
    for i, j in itertools.product(range(problem.columns), range(CLASSES)):
        moved = torch.zeros_like(w)
        moved[i, j] = step
        slope = (problem.value(w + moved).value - problem.value(w - moved).value) / (2 * step)
        assert slope == pytest.approx(float(gradient[i, j]), abs=2e-8)


def exact_loss(case, w):
    """Compute L(W) to 60 digits from the definition of the loss."""
    loss_fn, targets = CASES[case]
    h, rows = features().tolist(), targets.tolist()
    total = mpmath.mpf(0)
    weights = [mpmath.mpf(1)] * CLASSES
    smoothing = mpmath.mpf(0)
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        smoothing = mpmath.mpf(loss_fn.label_smoothing)
        if loss_fn.weight is not None:
            weights = [mpmath.mpf(float(value)) for value in loss_fn.weight]
    for x, y in zip(h, rows, strict=True):
        z = [mpmath.mpf(value) for value in x] + [mpmath.mpf(1)]
        u = [mpmath.fsum(a * mpmath.mpf(float(b)) for a, b in zip(z, column, strict=True)) for column in w.T]
        if isinstance(loss_fn, nn.CrossEntropyLoss):
            log_sum = mpmath.log(mpmath.fsum(mpmath.exp(value) for value in u))
            q = [mpmath.mpf(int(c == y)) for c in range(CLASSES)] if isinstance(y, int) else [mpmath.mpf(v) for v in y]
            q = [(1 - smoothing) * value + smoothing / CLASSES for value in q]
            scale = weights[y] if isinstance(y, int) else 1
            total += scale * mpmath.fsum(a * (log_sum - b) for a, b in zip(q, u, strict=True))
        elif isinstance(loss_fn, nn.BCEWithLogitsLoss):
            terms = [mpmath.log(1 + mpmath.exp(value)) - mpmath.mpf(t) * value for value, t in zip(u, y, strict=True)]
            total += mpmath.fsum(terms) / (1 if loss_fn.reduction == "sum" else CLASSES)
        else:
            off = [abs(value - mpmath.mpf(t)) for value, t in zip(u, y, strict=True)]
            if isinstance(loss_fn, nn.MSELoss):
                terms = [d**2 for d in off]
            elif isinstance(loss_fn, nn.HuberLoss):
                k = mpmath.mpf(loss_fn.delta)
                terms = [d**2 / 2 if d <= k else k * (d - k / 2) for d in off]
            elif isinstance(loss_fn, nn.SmoothL1Loss):
                k = mpmath.mpf(loss_fn.beta)
                terms = [d**2 / (2 * k) if d < k else d - k / 2 for d in off]
            else:
                terms = off
            total += mpmath.fsum(terms) / (1 if loss_fn.reduction == "sum" else CLASSES)
    if isinstance(loss_fn, nn.CrossEntropyLoss) and loss_fn.weight is not None and loss_fn.reduction == "mean":
        return total / mpmath.fsum(weights[y] for y in rows)
    return total / N


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_bounds_of_the_value_hold_the_exact_one(case, size):
    problem = held(case)
    w = size * some_w(problem)
    value = problem.value(w)
    with mpmath.workdps(60):
        exact = exact_loss(case, w)
        assert mpmath.mpf(value.lower) <= exact <= mpmath.mpf(value.upper)
    assert value.certified
    assert value.upper - value.lower <= 1e-11 * max(1.0, value.value)  # and the interval is not much too wide


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_stream_gives_what_held_features_give(case, bias):
    loss_fn, targets = CASES[case]
    source = Strips(features(), most=4)
    fixed = 8 * (WIDTH + bias) * CLASSES * 4
    streamed = HeadProblem(
        source, targets, loss_fn, outputs=CLASSES, bias=bias, max_memory=fixed + 4 * 2 * 8 * (WIDTH + 4 * CLASSES)
    )
    assert not streamed.held
    assert len(streamed.strips) == 6
    problem = held(case, bias=bias)
    w = some_w(problem)
    before = source.reads
    loss, gradient = streamed.loss_and_gradient(w)
    assert source.reads == before + 6  # one pass
    assert loss == pytest.approx(problem.loss_and_gradient(w)[0], rel=1e-13)
    torch.testing.assert_close(gradient, problem.loss_and_gradient(w)[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(streamed.outputs(w), problem.outputs(w), rtol=1e-13, atol=1e-14)
    assert streamed.value(w).lower <= problem.value(w).upper
    assert streamed.value(w).upper >= problem.value(w).lower


def test_features_that_fit_are_read_once_and_kept():
    source = Strips(features(), most=N)
    problem = HeadProblem(source, HARD, nn.CrossEntropyLoss())
    reads = source.reads
    problem.loss_and_gradient(problem.zeros())
    assert problem.held
    assert source.reads == reads


@pytest.mark.parametrize("case", [case for case in CASES if case != "absolute"])
def test_infima_of_the_samples_average_to_the_infimum(case):
    problem = held(case)
    mean = float(problem.losses.infima(slice(0, N)).mean())
    assert problem.infimum.lower - 1e-15 <= mean <= problem.infimum.upper + 1e-15
    assert problem.infimum.certified


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("excess", [1e-1, 1e-6])
def test_prescribed_outputs_are_as_good_as_asked_and_move_no_sample_that_is(case, excess):
    losses = held(case).losses
    outputs = 3 * normal(N, CLASSES, seed=11)
    rows = slice(0, N)
    before = losses.each(outputs, rows) - losses.infima(rows)
    found = prescribed_outputs(losses, outputs, excess)
    after = losses.each(found, rows) - losses.infima(rows)
    assert float(after.max()) <= excess * (1 + 1e-6) + 1e-14
    good = before <= excess
    assert torch.equal(found[good], outputs[good])
    # Not further than needed: the others stop close to the first point that is good enough.
    assert bool((after[~good] >= 0.9 * excess - 1e-12).all())


def test_prescribed_outputs_of_class_numbers_raise_only_the_class():
    losses = held("cross-entropy").losses
    outputs = normal(N, CLASSES, seed=11)
    moved = prescribed_outputs(losses, outputs, 1e-3) - outputs
    others = ~F.one_hot(HARD, CLASSES).bool()
    assert bool((moved[others] == 0).all())
    assert bool((moved[~others] > 0).all())


def test_stack_and_split_are_inverse_and_the_layers():
    layer = nn.Linear(WIDTH, CLASSES)
    problem = held("mse")
    w = problem.stack(layer.weight, layer.bias)
    torch.testing.assert_close(problem.outputs(w).float(), layer(features().float()), rtol=1e-5, atol=1e-6)
    weight, bias = problem.split(w)
    assert torch.equal(weight, layer.weight.detach().double())
    assert torch.equal(bias, layer.bias.detach().double())


def test_a_fixed_bias_is_added_and_not_trained():
    offset = normal(CLASSES, seed=4)
    problem = held("cross-entropy", bias=False, fixed_bias=offset)
    w = some_w(problem)
    expected = F.cross_entropy(features() @ w + offset, HARD)
    assert problem.value(w).lower <= float(expected) <= problem.value(w).upper
    assert problem.columns == WIDTH


def test_targets_of_one_column_and_flat_ones_are_the_same():
    flat = VALUES[:, 0]
    one, two = (HeadProblem(features(), targets, nn.MSELoss()) for targets in (flat, flat[:, None]))
    assert one.outputs_each == two.outputs_each == 1
    w = some_w(one)
    assert one.value(w) == two.value(w)


def test_the_callers_own_loss_is_taken_at_its_word_and_not_certified():
    def log_cosh(outputs, targets):
        return torch.log(torch.cosh(outputs - targets)).sum(1)

    problem = HeadProblem(features(), VALUES, log_cosh, infimum=0.0, smoothness=1.0)
    w = some_w(problem)
    expected = float(log_cosh(torch.cat([features(), torch.ones(N, 1)], 1) @ w, VALUES).mean())
    assert problem.value(w).value == pytest.approx(expected, rel=1e-13)
    assert not problem.value(w).certified
    assert (problem.infimum.value, problem.infimum.certified, problem.smoothness) == (0.0, False, 1.0)
    asked = HeadProblem(features(), VALUES, log_cosh, infimum=lambda targets: targets.abs().sum(1))
    assert asked.infimum.value == pytest.approx(float(VALUES.abs().sum(1).mean()))
    with pytest.raises(ValueError, match="caller's own loss"):
        prescribed_outputs(problem.losses, VALUES, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": HARD[:5]}, "targets: 5 for 24 samples"),
        ({"targets": HARD + 2}, "classes 2 to 4 for 3 outputs"),
        ({"targets": VALUES * float("nan")}, "NaN"),
        ({"features": features() / 0}, "NaN or infinite"),
        ({"loss_fn": "mse"}, "cannot be called"),
        ({"loss_fn": nn.CrossEntropyLoss(ignore_index=1)}, "8 samples have the class 1"),
        ({"fixed_bias": torch.zeros(3)}, "fixed_bias"),
        ({"features": torch.ones(N, 3, dtype=torch.int64)}, "int64"),
        ({"max_memory": -1}, "max_memory"),
        ({"targets": VALUES, "loss_fn": nn.MSELoss(), "outputs": 7}, "outputs: 7"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    options = {"features": features(), "targets": HARD, "loss_fn": nn.CrossEntropyLoss(), "outputs": CLASSES} | change
    with pytest.raises((ValueError, TypeError), match=message):
        HeadProblem(options.pop("features"), options.pop("targets"), options.pop("loss_fn"), **options)


def test_too_little_memory_is_refused_with_the_numbers():
    with pytest.raises(MemoryError, match="one row of features"):
        HeadProblem(Strips(features(), most=1), HARD, nn.CrossEntropyLoss(), max_memory=100)


def test_another_shape_of_w_is_refused():
    problem = held("mse")
    with pytest.raises(ValueError, match="shape"):
        problem.value(problem.zeros().T)
    with pytest.raises(ValueError, match="weight: shape"):
        problem.stack(torch.zeros(1, 1), torch.zeros(1))
    with pytest.raises(ValueError, match="bias: None"):
        problem.stack(torch.zeros(CLASSES, WIDTH))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_on_another_device_are_copied_to_the_targets(elsewhere, smoothing):
    """The run's loss module lies on its GPU, features and targets on the CPU; the module itself stays where it is."""
    features, labels = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    weight = torch.tensor([1.0, 2.0, 0.5])
    here = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    there = torch.nn.CrossEntropyLoss(weight=elsewhere(weight.clone()), label_smoothing=smoothing)
    found, expected = HeadProblem(features, labels, there), HeadProblem(features, labels, here)
    w = torch.randn(6, 3, dtype=torch.float64)
    assert found.value(w) == expected.value(w)
    assert found.infimum == expected.infimum
    assert type(there.weight) is not torch.Tensor
