"""What Du et al. ask for, measured: every inequality once where it holds and once where it does not, every number by hand."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lightning_conv import Bounded, fully_connected_limit, h_infinity, kernel_spectrum, ntk_gram
from lightning_conv.losses import loss_scale
from lightning_conv.networks.activation import largest_slope
from lightning_conv.networks.analytic import softplus
from lightning_conv.theory import DuConvResNet, DuFC, DuResNet, DuTwoLayer
from lightning_conv.theory.papers import du
from lightning_conv.theory.papers.du.movement import spectral_size

SOFTPLUS = softplus(1.0)


def samples(n=5, d=4, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def exactly(value):
    return Bounded(value, value, value, certified=True, method="given")


def diagonal(*values):
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def rotated(matrix, seed=0):
    q = torch.linalg.qr(
        torch.randn(len(matrix), len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )[0]
    return q @ matrix @ q.T


def descent(network, x, y, eta, loss_fn, steps):
    """Plain gradient descent; outputs before each step and after the last."""
    outputs = []
    for _ in range(steps):
        u = network(x)
        outputs.append(u.detach())
        gradients = torch.autograd.grad(loss_fn(u, y), [p for p in network.parameters() if p.requires_grad])
        with torch.no_grad():
            for p, g in zip((p for p in network.parameters() if p.requires_grad), gradients, strict=True):
                p -= eta * g
    return [*outputs, network(x).detach()]


@pytest.mark.parametrize(
    ("smallest", "verdict"), [(0.6, "consistent"), (0.5 - 1e-6, "refuted"), (0.1, "refuted"), (0.5, "undecided")]
)
def test_lambda_min_is_held_against_half_of_lambda_0(smallest, verdict):
    """At the bound itself the eigenvalue problem's error decides nothing."""
    found = du.lambda_min_criterion(rotated(diagonal(2 * smallest, 5.0, 7.0)), exactly(2.0))
    assert found.measured == pytest.approx(smallest, rel=1e-12)
    assert (found.verdict, found.bound) == (verdict, 0.5)


def test_an_uncertain_lambda_0_makes_the_verdict_uncertain():
    wide = Bounded(2.0, 1.5, 2.5, certified=False, method="given")
    assert du.lambda_min_criterion(diagonal(1.1, 5.0), wide).verdict == "undecided"
    assert du.lambda_min_criterion(diagonal(1.3, 5.0), wide).verdict == "consistent"
    assert du.lambda_min_criterion(diagonal(0.7, 5.0), wide).verdict == "refuted"


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("size", "verdict"), [(0.49, "consistent"), (0.51, "refuted")])
def test_drift_is_the_spectral_norm_over_lambda_0_against_a_quarter(size, verdict, sign):
    initial = rotated(diagonal(2.0, 3.0, 9.0))
    change = rotated(diagonal(sign * size, -sign * size / 3, 0.0), seed=1)
    found = du.drift_criterion(initial + (change + change.T) / 2, initial, exactly(2.0))
    assert found.measured == pytest.approx(size / 2, rel=1e-10)
    assert found.verdict == verdict


@pytest.mark.parametrize(("size", "verdict"), [(0.4, "consistent"), (0.6, "refuted")])
def test_the_initial_kernel_is_held_against_its_limit(size, verdict):
    x = samples()
    for limit in (h_infinity(x), fully_connected_limit(x, 2, SOFTPLUS)):
        matrix = limit if isinstance(limit, torch.Tensor) else limit.matrix
        lambda_0 = float(torch.linalg.eigvalsh(matrix)[0])
        moved = matrix + lambda_0 * size / 2 * torch.eye(5, dtype=torch.float64)
        found = du.initial_criterion(moved, limit)
        assert found.measured == pytest.approx(size / 2, rel=1e-8)
        assert found.verdict == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.7, "consistent"), (0.6, "refuted")])
def test_any_network_keeps_two_thirds_of_its_own_lambda_min(share, verdict):
    found = du.own_lambda_min_criterion(diagonal(2 * share, 9.0), diagonal(2.0, 4.0))
    assert found.measured == pytest.approx(share, rel=1e-12)
    assert found.verdict == verdict
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 1))
    gram = ntk_gram(model, samples().float(), precision="certified")
    assert du.own_lambda_min_criterion(gram, gram).verdict == "consistent"


def test_kernels_that_do_not_compare_are_refused():
    for call in (
        lambda: du.drift_criterion(diagonal(1.0), diagonal(1.0, 2.0), exactly(1.0)),
        lambda: du.initial_criterion(diagonal(1.0), h_infinity(samples())),
        lambda: du.own_lambda_min_criterion(diagonal(1.0), diagonal(1.0, 2.0)),
    ):
        with pytest.raises(ValueError, match="reference: shape"):
            call()


def test_the_contraction_is_held_against_every_step():
    rate = 1 - 0.1 * 2.0 / 2
    falling = [3.0 * rate**k * (0.99 if k else 1.0) for k in range(2000)]  # down to 1e-92
    assert du.contraction_criterion(falling, 0.1, 2.0).verdict == "consistent"
    assert du.contraction_criterion(falling, 0.1, exactly(2.0)).measured == pytest.approx(math.log(0.99), rel=1e-6)
    bumped = [*falling[:500], falling[500] * 1.05, *falling[501:]]
    assert du.contraction_criterion(bumped, 0.1, 2.0).verdict == "refuted"
    assert du.contraction_criterion([1.0, 0.0], 0.1, 2.0).verdict == "consistent"  # a loss of zero is below every bound
    with pytest.raises(ValueError, match="losses: 1 numbers"):
        du.contraction_criterion([1.0], 0.1, 2.0)
    with pytest.raises(ValueError, match="losses"):
        du.contraction_criterion([1.0, math.nan], 0.1, 2.0)
    with pytest.raises(ValueError, match="eta lambda_0 / 2 = 1"):
        du.contraction_criterion([1.0, 0.5], 1.0, 2.0)


def test_one_step_is_held_against_the_rate():
    assert du.step_criterion(2.0, 1.79, 0.1, 2.0).verdict == "consistent"
    assert du.step_criterion(2.0, 1.81, 0.1, 2.0).verdict == "refuted"
    assert du.step_criterion(2.0, 1.81, 0.1, 2.0).bound == pytest.approx(0.9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_run_on_another_scale_of_the_loss_has_the_same_verdict_after_conversion(reduction):
    """One linear layer: r <- (I - eta_S X X^T) r exactly, so the loss falls by a known factor along one eigenvector."""
    x = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    y = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    loss_fn, scale = nn.MSELoss(reduction=reduction), loss_scale(nn.MSELoss(reduction=reduction), 3, 1)
    eta = 0.04
    outputs = descent(model, x, y, eta, loss_fn, 10)
    losses = [float(loss_fn(u, y)) for u in outputs]
    step = scale.step_on_sum(eta)
    assert losses[1] / losses[0] == pytest.approx((1 - step) ** 2, rel=1e-12)
    assert du.contraction_criterion(losses, step, 1.0).verdict == "consistent"
    # The error shrinks by 2 eta - eta^2 a step: with lambda_0 / 2 above that the bound would be lower.
    assert du.contraction_criterion(losses, step, 4.01).verdict == "refuted"
    assert du.linearised_rate(x @ x.T, outputs[0] - y, step) == pytest.approx(2 * step, rel=1e-12)
    assert du.linearised_rate((x @ x.T).float(), outputs[0] - y, step) == pytest.approx(2 * step, rel=1e-6)


def test_the_linearised_rate_lies_between_its_ends_and_is_the_slope_of_the_loss():
    network, x, y = DuResNet(4, 30, 2), samples(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    gram = ntk_gram(network, x, precision="certified")
    r, eta = (network(x) - y).detach(), 1e-6
    rate = du.linearised_rate(gram, r, eta)
    values = torch.linalg.eigvalsh(gram.matrix)
    assert 2 * eta * float(values[0]) <= rate <= 2 * eta * float(values[-1])
    before, after = descent(network, x, y, eta, lambda u, y: (u - y).square().sum() / 2, 1)
    fallen = 1 - float((after - y).square().sum() / (before - y).square().sum())
    assert fallen == pytest.approx(rate, rel=1e-3)
    with pytest.raises(ValueError, match="residual: 4 numbers for a kernel of 5 rows"):
        du.linearised_rate(gram, r[:4], eta)


def test_the_linearisation_error_is_of_second_order_in_the_step():
    x, y = samples(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    found = []
    for eta in (1e-2, 1e-3):
        network = DuFC(4, 40, 2)
        gram = ntk_gram(network, x, precision="certified")
        before, after = descent(network, x, y, eta, lambda u, y: (u - y).square().sum() / 2, 1)
        found.append(du.linearisation(before, after, y, gram, eta))
        by_hand = (after - before + eta * gram.matrix @ (before - y)).norm()
        assert found[-1].remainder == pytest.approx(float(by_hand), rel=1e-9)
        assert found[-1].residual == pytest.approx(float((before - y).norm()), rel=1e-14)
    assert found[0].remainder / found[1].remainder == pytest.approx(100, rel=0.1)
    assert found[0].relative / found[1].relative == pytest.approx(10, rel=0.1)


def test_the_two_bounds_on_a_step_hold_and_break():
    def criteria(remainder, change):
        found = du.Linearisation(remainder=remainder, change=change, predicted_change=1.0, residual=2.0)
        return [c.verdict for c in du.linearisation_criteria(found, step=0.4, lambda_0=exactly(2.0))]  # bound 0.1

    assert criteria(0.19, 0.6) == ["consistent", "consistent"]  # 0.095 and 0.09
    assert criteria(0.21, 0.6) == ["refuted", "consistent"]
    assert criteria(0.19, 0.64) == ["consistent", "refuted"]
    assert math.isinf(du.Linearisation(1.0, 1.0, 0.0, 1.0).relative)


def test_the_rounding_of_a_step_and_the_error_of_lambda_0_are_in_the_verdict():
    def criteria(rounding, lambda_0):
        found = du.Linearisation(remainder=0.19, change=0.6, predicted_change=1.0, residual=2.0, rounding=rounding)
        return [
            c.verdict for c in du.linearisation_criteria(found, step=0.4, lambda_0=lambda_0)
        ]  # 0.095, 0.09; bound 0.1

    assert criteria(0.009, exactly(2.0)) == ["consistent", "consistent"]
    assert criteria(0.011, exactly(2.0)) == ["undecided", "consistent"]  # up to 0.1005
    assert criteria(0.04, exactly(2.0)) == ["undecided", "undecided"]  # 0.32^2
    wide = Bounded(2.0, 1.5, 2.5, certified=False, method="")
    assert criteria(0.0, wide) == ["undecided", "undecided"]  # 0.095 and 0.09 against a bound of 0.075 to 0.125
    assert criteria(0.0, Bounded(2.0, -0.1, 4.0, certified=False, method="")) == ["undecided", "undecided"]
    assert not du.Linearisation(0.1, 0.1, 1.0, 1.0, rounding=0.011).resolved
    assert du.Linearisation(0.1, 0.1, 1.0, 1.0, rounding=0.009).resolved


def test_the_error_of_the_kernel_is_a_part_of_the_rounding():
    network, x, y = DuFC(4, 10, 1), samples(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    gram = ntk_gram(network, x, precision="fast")
    before, after = descent(network, x, y, 0.01, lambda u, y: (u - y).square().sum() / 2, 1)
    found = du.linearisation(before, after, y, gram, 0.01, rounding=1e-3)
    error = gram.floor + 2 * gram.jacobian_error * gram.trace
    assert found.rounding == pytest.approx(1e-3 + 0.01 * error * float((before - y).norm()), rel=1e-12)


def test_a_wide_network_and_a_small_step_satisfy_the_whole_chain():
    """Two layers, m = 20,000: every inequality measured in a run, and the last one follows from the others."""
    x, y = samples(4, 6), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    limit = h_infinity(x)
    lambda_0 = kernel_spectrum(limit).lambda_min
    network = DuTwoLayer(6, 20_000, seed=1)
    initial, weight = du.last_hidden_gram(network, x), network.hidden.weight.detach().clone()
    eta = 0.1
    outputs = descent(network, x, y, eta, lambda u, y: (u - y).square().sum() / 2, 60)
    losses = [float((u - y).square().sum()) / 2 for u in outputs]
    gram = du.last_hidden_gram(network, x)
    radius = du.neuron_radius(float((outputs[0] - y).norm()), 4, 20_000, lambda_0.value)
    chain = [
        du.initial_criterion(initial, limit),
        du.drift_criterion(gram, initial, lambda_0),
        du.lambda_min_criterion(gram, lambda_0),
        du.contraction_criterion(losses, eta, lambda_0),
        du.neuron_movement_criterion(du.neuron_movement(network.hidden.weight, weight), radius),
    ]
    assert [c.verdict for c in chain] == ["consistent"] * 5
    narrow = DuTwoLayer(6, 6, seed=0)
    assert du.initial_criterion(du.last_hidden_gram(narrow, x), limit).verdict == "refuted"


def test_labels_along_eigenvectors_shrink_at_their_own_rates():
    x, y = samples(), torch.linspace(-1, 2, 5, dtype=torch.float64)
    kernel, eta, steps = h_infinity(x), 0.3, [0, 1, 5, 400]
    values, vectors = np.linalg.eigh(kernel.numpy())
    by_hand = [
        math.sqrt(sum((1 - eta * v) ** (2 * k) * float(vectors[:, i] @ y.numpy()) ** 2 for i, v in enumerate(values)))
        for k in steps
    ]
    assert du.predicted_residuals(kernel, y, eta, steps).tolist() == pytest.approx(by_hand, rel=1e-9)
    found, shares = du.label_energies(kernel, y)
    assert found.tolist() == pytest.approx(values[::-1].tolist())
    assert float(shares.sum()) == pytest.approx(1.0)
    assert shares.tolist() == pytest.approx(((vectors.T @ y.numpy())[::-1] ** 2 / float(y @ y)).tolist())
    measure = math.sqrt(2 * float(y.numpy() @ np.linalg.solve(kernel.numpy(), y.numpy())) / 5)
    assert du.generalisation_measure(kernel, y) == pytest.approx(measure, rel=1e-10)
    with pytest.raises(ValueError, match="labels: all are zero"):
        du.label_energies(kernel, torch.zeros(5))
    with pytest.raises(ValueError, match="need a positive definite kernel"):
        du.generalisation_measure(torch.zeros(2, 2, dtype=torch.float64), torch.ones(2))


@pytest.mark.parametrize(("kappa", "tolerance"), [(1.0, 0.01), (0.1, 0.05)])
def test_the_label_prediction_is_close_for_a_wide_network(kappa, tolerance):
    """From u(0) - y at any scale of the start; from y alone, as Theorem 4.1 has it, where the start is small."""
    x, y = samples(4, 6), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    network = DuTwoLayer(6, 20_000, kappa=kappa)
    outputs = descent(network, x, y, 0.5, lambda u, y: (u - y).square().sum() / 2, 60)
    predicted = du.predicted_residuals(h_infinity(x), outputs[0] - y if kappa == 1 else y, 0.5, range(61))
    measured = torch.stack([(u - y).norm() for u in outputs])
    assert float((measured - predicted).abs().max()) < tolerance * float(y.norm())
    assert float(measured[-1]) < 0.05 * float(measured[0])


def test_pattern_changes_count_signs():
    before = torch.tensor([[1.0, -1.0, 0.0], [2.0, -2.0, 3.0]])
    after = torch.tensor([[-1.0, -1.0, -0.1], [2.0, 0.0, 3.0]])
    assert du.pattern_changes(after, before) == pytest.approx(3 / 6)
    assert du.pattern_changes(before, before) == 0
    with pytest.raises(ValueError, match=r"now: shape \(1, 3\)"):
        du.pattern_changes(after[:1], before)


def test_neurons_are_held_against_the_radius():
    before = torch.zeros(3, 2)
    after = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    movement = du.neuron_movement(after, before)
    assert movement.tolist() == [0.0, 5.0, 1.0]
    assert du.neuron_movement_criterion(movement, 5.0).verdict == "consistent"
    assert du.neuron_movement_criterion(movement, 4.9).verdict == "refuted"
    assert du.neuron_radius(3.0, 4, 100, 0.5) == pytest.approx(4 * 2 * 3 / (10 * 0.5))
    assert du.neuron_radius(3.0, 4, 100, 0.5, descent="flow") == pytest.approx(2 * 3 / (10 * 0.5))
    with pytest.raises(ValueError, match="lambda_0"):
        du.neuron_radius(3.0, 4, 100, 0.0)
    with pytest.raises(ValueError, match=r"weight: shape \(3, 2\)"):
        du.neuron_movement(after, before[:2])


def test_layers_are_held_against_the_radius_of_lemma_b5():
    network = DuFC(4, 50, 2)
    initial = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        network.hidden[1].weight[0, 0] += 3.0
        network.output.weight[0, :2] += torch.tensor([3.0, 4.0], dtype=torch.float64)
    movements = du.layer_movement(network, initial)
    assert [m.name for m in movements] == ["hidden.0.weight", "hidden.1.weight", "output.weight"]
    assert [m.frobenius for m in movements] == pytest.approx([0.0, 3.0, 5.0])
    assert [m.averaged for m in movements] == pytest.approx([0.0, 3 / math.sqrt(50), 5 / math.sqrt(50)])
    assert du.layer_movement_criterion(movements, 0.72).verdict == "consistent"
    assert du.layer_movement_criterion(movements, 0.70).verdict == "refuted"
    with pytest.raises(ValueError, match=r"initial: has no 'hidden\.0\.weight'"):
        du.layer_movement(network, {})


def test_the_radius_of_lemma_b5_is_its_formula_with_this_networks_constants():
    network = DuFC(4, 50, 3)
    w = [layer.weight.detach().numpy() for layer in network.hidden]
    c_w = max(np.linalg.svd(matrix)[1][0] for matrix in w) / math.sqrt(50)
    a = np.linalg.norm(network.output.weight.detach().numpy()) / math.sqrt(50)
    c_x = 2 * math.sqrt(network.c_sigma) * c_w
    expected = 16 * 2 * a * c_x**3 * math.sqrt(9) * 0.7 / (0.3 * math.sqrt(50))
    assert du.layer_radius(network, 0.7, 9, 0.3) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(TypeError, match="DuResNet"):
        du.layer_radius(DuResNet(4, 50, 3), 0.7, 9, 0.3)


def test_the_constant_of_wide_layers_is_a_bound_from_above_without_their_singular_values(monkeypatch):
    network = DuFC(4, 400, 2)
    exact = max(np.linalg.svd(w.detach().numpy(), compute_uv=False)[0] for w in network.parameters()) / 20

    def small_alone(real):
        def checked(matrix, *args, **kwargs):
            assert min(matrix.shape) < 100  # what Lanczos does inside
            return real(matrix, *args, **kwargs)

        return checked

    for name in ("matrix_norm", "svdvals", "svd"):
        monkeypatch.setattr(torch.linalg, name, small_alone(getattr(torch.linalg, name)))
    assert exact <= spectral_size(network) <= exact * (1 + 1e-6)


def test_norms_of_features_are_held_against_one_half_and_two():
    network, x = DuResNet(4, 400, 3), samples()
    norms = du.layer_norms(network, x)
    by_hand = [[float(layer[i].detach().norm()) for i in range(5)] for layer in network.states(x)[0][1:]]
    assert torch.allclose(norms, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-13)
    assert du.layer_norms_criterion(norms).verdict == "consistent"
    assert du.layer_norms_criterion(torch.tensor([[1.9, 0.51]])).verdict == "consistent"
    assert du.layer_norms_criterion(torch.tensor([[1.0, 0.49]])).verdict == "refuted"
    assert du.layer_norms_criterion(torch.tensor([[2.1, 1.0]])).verdict == "refuted"


@pytest.mark.parametrize("width", [7, 5000])
def test_the_fast_descent_is_autograds_on_the_weights(width):
    x, y = samples(6, 4), torch.linspace(-1, 1, 6, dtype=torch.float64)
    network = DuTwoLayer(4, width, seed=2)
    start = network.hidden.weight.detach().clone()
    run = du.TwoLayerDescent(network, x, y)
    for _ in range(30):
        run.step(0.4)
    outputs = descent(network, x, y, 0.4, lambda u, y: (u - y).square().sum() / 2, 30)
    weight = network.hidden.weight.detach()
    assert run.steps == 30
    assert torch.allclose(run.outputs, outputs[-1], rtol=1e-10)
    assert torch.allclose(run.residual, outputs[-1] - y, rtol=1e-9)
    assert torch.allclose(run.weight(), weight, rtol=1e-10)
    assert torch.allclose(run.gram(), du.last_hidden_gram(network, x), rtol=1e-12)
    assert torch.allclose(run.neuron_movement(), du.neuron_movement(weight, start), rtol=1e-8, atol=1e-12)
    assert run.pattern_changes() == du.pattern_changes(x @ weight.T, x @ start.T)
    if width == 7:
        assert run.pattern_changes() > 0


def test_the_fast_descent_refuses_what_it_does_not_cover():
    x, y = samples(), torch.zeros(5)
    with pytest.raises(ValueError, match="need ReLU"):
        du.TwoLayerDescent(DuTwoLayer(4, 8, activation=nn.Tanh()), x, y)
    with pytest.raises(ValueError, match="not trained"):
        du.TwoLayerDescent(DuTwoLayer(4, 8, train_output=True), x, y)
    with pytest.raises(ValueError, match=r"x, y: shapes \(5, 4\), \(4,\)"):
        du.TwoLayerDescent(DuTwoLayer(4, 8), x, y[:4])


@pytest.mark.parametrize("kind", [DuFC, DuResNet])
def test_the_sensitivity_is_the_norm_of_the_jacobian_by_autograd(kind):
    network, x = kind(4, 9, 3), samples(2)
    weights = {name: p.detach() for name, p in network.named_parameters() if name.startswith("hidden")}
    for i in range(2):
        jacobian = torch.func.jacrev(
            lambda w, i=i: torch.func.functional_call(
                _Features(network), {f"network.{k}": v for k, v in w.items()}, x[i : i + 1]
            )
        )(weights)
        rows = torch.cat([part.reshape(9, -1) for part in jacobian.values()], 1)
        norm = float(torch.linalg.matrix_norm(rows, 2))
        assert float(du.feature_sensitivity(network, x)[i]) == pytest.approx(3 * norm, rel=1e-10)


class _Features(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.states(x)[0][-1][0]


def test_the_bound_of_lemma_b3_holds_and_grows_exponentially():
    x = samples()
    bounds = []
    for depth in (1, 2, 3, 4):
        network = DuFC(4, 60, depth, activation=torch.tanh)
        bounds.append(du.propagation_bound(network))
        assert float(du.feature_sensitivity(network, x).max()) <= bounds[-1]
    assert bounds[0] == pytest.approx(2 * math.sqrt(DuFC(4, 60, 1, activation=torch.tanh).c_sigma))
    assert all(b / a > 4 for a, b in pairwise(bounds[1:]))
    with pytest.raises(TypeError, match="DuResNet"):
        du.propagation_bound(DuResNet(4, 8, 2))
    with pytest.raises(TypeError, match="DuConvResNet"):
        du.feature_sensitivity(DuConvResNet(1, (3, 3), 4, 2), torch.ones(1, 1, 3, 3).double())


def test_the_largest_slope_is_that_of_a_search():
    for activation in (nn.SiLU(), nn.GELU(), nn.Tanh(), nn.ReLU(), softplus(5.0)):
        z = torch.linspace(-30, 30, 2_000_003, dtype=torch.float64)
        differences = (activation(z[2:]) - activation(z[:-2])) / (z[2:] - z[:-2])
        assert largest_slope(activation) == pytest.approx(float(differences.abs().max()), rel=1e-6)


def test_the_error_of_lambda_0_is_in_the_verdict_of_a_step():
    lambda_0 = Bounded(2.0, 1.0, 3.0, False, "test")  # the bound on L(k+1) / L(k) lies between 0.85 and 0.95
    verdicts = [du.step_contraction_criterion(ratio, 0.1, lambda_0).verdict for ratio in (0.84, 0.86, 0.94, 0.96)]
    assert verdicts == ["consistent", "undecided", "undecided", "refuted"]
    assert du.step_contraction_criterion(0.84, math.nan, lambda_0).verdict == "undecided"
