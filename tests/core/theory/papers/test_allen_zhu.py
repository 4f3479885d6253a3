"""Allen-Zhu, Li & Song 2019: every number against a closed form, a double loop, autograd or another route."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.losses.squared import half_sum_of_squares
from lightning_conv.theory.networks import AllenZhuNet
from lightning_conv.theory.papers.allen_zhu import (
    Residual,
    are_unit_inputs,
    drift_constant,
    fit_semi_smoothness,
    forward_drift,
    gradient_ratios,
    hidden_norms,
    pairs_within,
    residual,
    separation,
    sign_change_exponent,
    step_size,
    unit_inputs,
    worst_size,
    worst_step,
)
from lightning_conv.theory.tools.activations import activation_patterns, preactivations
from lightning_conv.theory.tools.power_law import power_law


@pytest.fixture(autouse=True)
def _settled():
    """torch calls the default precision "none" until somebody has set it once; it is the same one."""
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())


@pytest.fixture
def data():
    return unit_inputs(torch.randn(7, 4, dtype=torch.float64)), torch.randn(7, 3, dtype=torch.float64)


@pytest.fixture
def net():
    return AllenZhuNet(5, 40, 3, 3, seed=1)


def double_loop(x, labels=None):
    pairs = [(i, j) for i in range(len(x)) for j in range(i) if labels is None or labels[i] != labels[j]]
    return min((float((x[i] - x[j]).norm()), (j, i)) for i, j in pairs)


def test_unit_inputs_are_the_papers():
    x = torch.randn(6, 3, 2, dtype=torch.float64)
    unit = unit_inputs(x)
    assert torch.allclose(unit.norm(dim=1), torch.ones(6, dtype=torch.float64), rtol=1e-14)
    assert torch.allclose(unit[:, -1], torch.full((6,), 0.5, dtype=torch.float64).sqrt(), rtol=1e-15)
    assert torch.allclose(unit_inputs(3 * x), unit, rtol=1e-14)
    with pytest.raises(ValueError, match="sample 1 has norm 0"):
        unit_inputs(torch.tensor([[1.0], [0.0]]))


@pytest.mark.parametrize("block", [3, 64])
def test_delta_is_the_smallest_of_all_distances(block):
    inputs, labels = torch.randn(40, 3), torch.randint(3, (40,))
    found = separation(inputs, labels, block=block)
    x = unit_inputs(inputs)
    for closest, wanted in ((found.delta, double_loop(x)), (found.by_label, double_loop(x, labels))):
        assert (closest.first, closest.second) == wanted[1]
        assert closest.distance.lower <= wanted[0] <= closest.distance.upper
        assert closest.distance.upper - closest.distance.lower < 1e-13
    assert found.by_label.distance.value >= found.delta.distance.value
    assert [criterion.verdict for criterion in found.criteria()] == ["certified", "certified"]
    assert found.criteria(least=2.0)[0].verdict == "refuted"


def test_inputs_that_point_the_same_way_are_not_separated():
    inputs = torch.randn(5, 4)
    inputs[3] = 2 * inputs[1]
    found = separation(inputs, torch.tensor([0, 1, 0, 1, 0]), below=(1e-9,))
    assert found.criteria()[0].verdict in (
        "refuted",
        "undecided",
    )  # rounding of the normalisation may tell the two apart
    assert found.criteria()[1].verdict == "certified"  # they have one label
    assert found.below == {1e-9: 1}
    with pytest.raises(ValueError, match="two different ones"):
        separation(inputs, torch.zeros(5))


@pytest.mark.parametrize("block", [4, 100])
def test_pairs_are_counted_as_a_double_loop_counts_them(block):
    x = torch.randn(30, 2, dtype=torch.float64)
    x[7] = x[3]
    x[20] = x[3]
    x[11] = x[5] + 1e-9
    distances = [0.0, 2e-9, 0.1, 1.0, 100.0]
    all_pairs = [float((x[i] - x[j]).norm()) for i in range(30) for j in range(i)]
    assert pairs_within(x, distances, block=block) == {d: sum(p <= d for p in all_pairs) for d in distances}
    assert pairs_within(x, [0.0])[0.0] == 3
    with pytest.raises(ValueError, match="distances"):
        pairs_within(x, [-1.0])


def test_the_network_is_drawn_and_computed_as_in_the_paper():
    net = AllenZhuNet(5, 2000, 2, 50)
    assert float(net.first.weight.var()) == pytest.approx(2 / 2000, rel=0.05)
    assert float(net.weights[1].var()) == pytest.approx(2 / 2000, rel=0.01)
    assert float(net.last.weight.var()) == pytest.approx(1 / 50, rel=0.02)
    assert not net.first.weight.requires_grad
    assert not net.last.weight.requires_grad
    x = unit_inputs(torch.randn(3, 4))
    states = net.states(x)
    assert torch.allclose(net(x), states[-1] @ net.last.weight.T, rtol=1e-13)
    norms = hidden_norms(states)
    assert 0.75 <= norms.smallest <= norms.largest <= 1.25
    assert [criterion.verdict for criterion in norms.criteria()] == ["consistent", "consistent"]
    assert {criterion.verdict for criterion in norms.criteria(papers_network=False)} == {"not applicable"}
    assert hidden_norms([2 * h for h in states]).criteria()[1].verdict == "refuted"


def test_the_gradient_in_closed_form_is_autograds(net, data):
    x, y = data
    exact = net.objective(x, y)
    loss = (net(x) - y).square().sum() / 2
    assert exact.loss == pytest.approx(float(loss.detach()), rel=1e-13)
    by_autograd = torch.autograd.grad(loss, [layer.weight for layer in net.hidden])
    for mine, theirs in zip(exact.gradient.values(), by_autograd, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-13)


def test_the_hooked_way_and_the_closed_form_agree(net, data, snapshot):
    x, y = data
    before = snapshot(net)
    hooked = half_sum_of_squares(net, x, y, block=3)
    exact = net.objective(x, y)
    assert snapshot(net) == before
    assert torch.allclose(hooked.per_sample, exact.per_sample, rtol=1e-12)
    assert hooked.squared_gradient == pytest.approx(exact.squared_gradient, rel=1e-12)
    assert set(hooked.gradient) == {f"hidden.{k}.weight" for k in range(3)}
    patterns = activation_patterns(net, x, block=3)
    for layer, state in zip(patterns.layers, net.states(x), strict=True):
        assert torch.equal(layer.active_fraction, (state > 0).double().mean(1))
    for z, state in zip(preactivations(net, x, block=2).values(), net.states(x), strict=True):
        assert torch.allclose(z.clamp(min=0), state, rtol=1e-12)


def test_the_gradient_ratio_lies_between_the_kernels_eigenvalues(net, data):
    x, y = data
    ratios = gradient_ratios(net.objective(x, y))
    spectrum = kernel_spectrum(ntk_gram(net, x, outputs="full"))
    assert 2 * spectrum.lambda_min.lower <= ratios.over_sum <= 2 * spectrum.lambda_max.upper
    per_sample = net.objective(x, y).per_sample
    assert ratios.over_largest == pytest.approx(ratios.squared_gradient / float(per_sample.max()))
    assert ratios.lower_constant(width=40, samples=7, outputs=3, delta=0.5) == pytest.approx(
        ratios.over_largest * 3 * 7 / (0.5 * 40)
    )
    assert ratios.upper_constant(width=40, samples=7, outputs=3, depth=3) == pytest.approx(
        ratios.over_sum * 3 / (3 * 7 * 40)
    )


def test_a_mean_loss_has_the_ratio_of_the_sum_times_its_scale(net, data):
    x, y = data
    loss = nn.MSELoss()(net(x), y)
    gradients = torch.autograd.grad(loss, [layer.weight for layer in net.hidden])
    ratio = sum(float(g.square().sum()) for g in gradients) / float(loss.detach())
    assert ratio == pytest.approx(2 / y.numel() * gradient_ratios(net.objective(x, y)).over_sum, rel=1e-12)


def test_objective_of_wrong_targets_is_refused(net, data):
    with pytest.raises(ValueError, match=r"targets: shape \(7, 2\); need \(n, 3\)"):
        half_sum_of_squares(net, data[0], data[1][:, :2])


class Functional(nn.Module):
    """ReLUs as functions, in place, twice in one module."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 3, 3), nn.Linear(48, 9)

    def forward(self, x):
        x = self.one(x).relu_()
        return nn.functional.leaky_relu(self.two(x.flatten(1)), 0.1)


def test_rectifiers_that_are_called_as_functions_are_seen(snapshot):
    model, x = Functional(), torch.randn(5, 1, 6, 6)
    before = snapshot(model)
    patterns = activation_patterns(model, x, block=2)
    assert snapshot(model) == before
    assert [(layer.name, layer.units) for layer in patterns.layers] == [("", 48), ("#2", 9)]
    first = model.one(x).flatten(1)
    assert torch.equal(patterns.layers[0].active_fraction, (first > 0).double().mean(1))
    assert torch.equal(patterns.layers[1].active_fraction, (model.two(first.relu()) > 0).double().mean(1))
    with pytest.raises(ValueError, match="calls no ReLU"):
        activation_patterns(nn.Linear(2, 2), torch.ones(1, 2))


def test_changes_are_counted_unit_by_unit(net, data):
    x, _ = data
    before, then = activation_patterns(net, x), net.states(x)
    with torch.no_grad():
        for layer in net.hidden:
            layer.weight.add_(torch.randn(40, 40, dtype=torch.float64), alpha=0.05)
    now = net.states(x)
    wanted = torch.stack([((a > 0) != (b > 0)).sum(1) for a, b in zip(now, then, strict=True)])
    after = activation_patterns(net, x)
    assert torch.equal(after.changes(before), wanted)
    assert torch.allclose(after.changed_fraction(before), wanted.double().mean(1) / 40)
    assert int(wanted[0].sum()) == 0  # A is fixed
    assert int(wanted[1:].sum()) > 0
    with pytest.raises(ValueError, match="same set"):
        after.changes(activation_patterns(net, x[:3]))


def test_forward_drift_is_the_largest_over_samples_and_layers(net, data):
    then = net.states(data[0])
    now = [h + k * torch.eye(7, 40, dtype=torch.float64) for k, h in enumerate(then)]
    assert forward_drift(now, then) == pytest.approx(3.0)
    assert drift_constant(3.0, 0.5, depth=4, width=100) == pytest.approx(3 / (0.5 * 4**2.5 * math.sqrt(math.log(100))))
    with pytest.raises(ValueError, match="shapes"):
        forward_drift(now[:2], then)


def test_the_residual_of_one_linear_piece_is_the_quadratic_part():
    """L = 1 and no unit that switches: rho = (1/2) sum_i |B D_i V h_{i,0}|^2 exactly."""
    net = AllenZhuNet(5, 30, 1, 2, seed=2)
    x, y = unit_inputs(torch.randn(6, 4)), torch.randn(6, 2, dtype=torch.float64)
    h = net.states(x)
    margin = float((h[0] @ net.weights[0].T).abs().min())
    step = torch.randn(30, 30, dtype=torch.float64)
    step *= 0.5 * margin / float((h[0] @ step.T).abs().max())
    found = residual(net, x, y, {"hidden.0.weight": step})
    exact = (((h[1] > 0) * (h[0] @ step.T)) @ net.last.weight.T).square().sum() / 2
    assert found.value == pytest.approx(float(exact), rel=1e-6)
    assert found.size == pytest.approx(float(torch.linalg.svdvals(step)[0]), rel=1e-10)
    with pytest.raises(ValueError, match=r"step: \['nothing'\] are no parameters"):
        residual(net, x, y, {"nothing": step})


def test_the_residual_is_that_of_the_loss_along_the_step(net, data, snapshot):
    x, y = data
    step = {name: 0.1 * torch.randn_like(p) for name, p in net.named_parameters() if p.requires_grad}
    before = snapshot(net)
    found = residual(net, x, y, step)
    assert snapshot(net) == before
    start = net.objective(x, y)
    linear = sum(float((g * step[name]).sum()) for name, g in start.gradient.items())
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(step.get(name, torch.zeros_like(p)))
    assert found.value == pytest.approx(net.objective(x, y).loss - start.loss - linear, rel=1e-9)
    assert step_size(step) == pytest.approx(max(float(torch.linalg.svdvals(v)[0]) for v in step.values()), rel=1e-9)


def steps_with(a, b, seed, noise=0.0, count=40):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        loss, size = float(10 ** rng.uniform(-3, 1)), float(10 ** rng.uniform(-2, 0))
        rho = (a * math.sqrt(loss) * size + b * size**2) * (1 - noise * rng.uniform())
        found.append(Residual(loss, loss - 0.25 + rho, -0.25, size))
    return found


def test_the_fit_finds_the_constants_that_made_the_steps():
    fit = fit_semi_smoothness(steps_with(0.3, 2.0, 0))
    assert (fit.a, fit.b, fit.margin) == (
        pytest.approx(0.3, rel=1e-6),
        pytest.approx(2.0, rel=1e-6),
        pytest.approx(1.0),
    )
    assert fit.told_apart
    assert fit.judge(steps_with(0.29, 1.9, 1)).verdict == "consistent"
    assert fit.judge(steps_with(0.4, 2.0, 1)).verdict == "refuted"
    assert fit.judge([]).verdict == "undecided"


def test_the_fitted_bound_holds_on_the_steps_it_was_fitted_to():
    steps = steps_with(0.3, 2.0, 3, noise=0.6)
    fit = fit_semi_smoothness(steps)
    assert fit.margin > 1
    assert max(fit.use(steps)) == pytest.approx(1.0)
    wiggly = steps_with(-0.2, 1.0, 4)
    assert fit_semi_smoothness(wiggly).a >= 0  # constants are not negative


def test_one_positive_residual_among_negative_ones_is_bounded_and_a_violated_zero_bound_is_refuted():
    """NNLS alone gives a = b = 0 here, which is no bound even on the steps that it was fitted to."""
    steps = [Residual(1.0, 1.0 + rho, 0.0, size) for rho, size in ((-0.5, 0.5), (-0.3, 1.0), (0.04, 0.2), (0.01, 0.5))]
    fit = fit_semi_smoothness(steps)
    assert (fit.a, fit.b) == (0.0, pytest.approx(0.04 / 0.2**2))
    assert all(step.value <= fit.bound(step) * (1 + 1e-12) for step in steps)
    assert max(fit.use(steps)) == pytest.approx(1.0)
    below = fit_semi_smoothness(steps[:2])  # no residual is positive: the linear part is a bound
    assert (below.a, below.b, below.use(steps[:2])) == (0.0, 0.0, [0.0, 0.0])
    assert below.judge(steps[:2]).verdict == "consistent"
    assert below.use(steps) == [0.0, 0.0, math.inf, math.inf]
    assert below.judge(steps).verdict == "refuted"


def test_steps_of_one_length_do_not_tell_the_two_constants_apart():
    steps = [Residual(f, f - 0.1 * f + 0.02 * f, -0.1 * f, 0.3 * math.sqrt(f)) for f in (4.0, 1.0, 0.25)]
    fit = fit_semi_smoothness(steps)
    assert not fit.told_apart
    assert fit.bound(steps[0]) == pytest.approx(0.02 * 4, rel=1e-9)
    with pytest.raises(ValueError, match="0 of 1 stand above rounding"):
        fit_semi_smoothness([Residual(1.0, 1.0, 0.0, 1.0)])


def test_a_power_law_is_found_with_its_error():
    x = np.geomspace(1, 100, 20)
    rng = np.random.default_rng(0)
    noisy = power_law(x, 3 * x**0.7 * np.exp(0.1 * rng.standard_normal(20)))
    reference = np.polyfit(np.log(x), np.log(3 * x**0.7), 1)
    assert abs(noisy.exponent - reference[0]) < 3 * noisy.error < 0.2
    exact = power_law([*x, 5.0], [*(3 * x**0.7), 0.0])  # a zero has no logarithm
    assert (exact.exponent, exact.factor, exact.points) == (pytest.approx(0.7), pytest.approx(3.0), 20)
    with pytest.raises(ValueError, match="1 positive points"):
        power_law([1.0, 2.0], [1.0, 0.0])


@pytest.mark.parametrize(("exponent", "verdict"), [(1.0, "consistent"), (2 / 3, "consistent"), (0.5, "refuted")])
def test_the_lemmas_exponent_is_a_least_one(exponent, verdict):
    omega = [0.01, 0.1, 1.0]
    found = sign_change_exponent(omega, [0.2 * w**exponent for w in omega], tolerance=0.04)
    assert found.verdict == verdict
    assert found.bound == pytest.approx(2 / 3 - 0.04)
    assert "exponent >= 2/3, less 0.04" in found.asks


@pytest.mark.slow
def test_the_worst_step_attains_the_lemmas_exponent():
    net = AllenZhuNet(5, 4000, 1, 1)
    weight, h = net.weights[0], net.states(unit_inputs(torch.randn(1, 4)))[0][0]
    omega, fraction = [], []
    for switched in (20, 80, 320, 800):
        step = worst_step(weight, h, switched)
        turned = ((weight + 1.001 * step) @ h > 0) != (weight @ h > 0)
        assert int(turned.sum()) == switched
        assert int((((weight + 0.999 * step) @ h > 0) != (weight @ h > 0)).sum()) == 0
        size = float((step @ h).norm() / h.norm())
        assert size == pytest.approx(float(step.norm()), rel=1e-9)  # rank one: |V|_2 = |V|_F, and no V does with less
        assert worst_size(weight @ h, float(h.norm()), switched) == pytest.approx(size, rel=1e-12)
        omega.append(size)
        fraction.append(switched / 4000)
        assert switched / 4000 == pytest.approx((3 / math.pi) ** (1 / 3) * size ** (2 / 3), rel=0.25)
    law = power_law(omega, fraction)
    assert law.exponent == pytest.approx(2 / 3, abs=0.04)
    with pytest.raises(ValueError, match="switched: 0"):
        worst_step(weight, h, 0)


def test_inputs_that_are_normalised_already_keep_their_distance():
    x = unit_inputs(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert are_unit_inputs(x)
    assert not are_unit_inputs(x[:, :-1])
    by_hand = min(float((x[i] - x[j]).norm()) for i in range(6) for j in range(i))
    assert separation(x, normalised=True).delta.distance.value == pytest.approx(by_hand, rel=1e-12)
    assert separation(x).delta.distance.value == pytest.approx(by_hand / math.sqrt(2), rel=1e-12)  # normalised twice


def test_two_points_have_no_error_and_so_no_verdict_beyond_it():
    assert sign_change_exponent([1.0, 2.0], [1.0, 2**0.5]).verdict == "refuted"
    assert sign_change_exponent([1.0, 2.0], [1.0, 2**0.5], errors=2).verdict == "undecided"
