"""Gradient descent in the kernel's eigenbasis against descent itself, step by step, and against closed forms."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.kernels.contraction import (
    contracted_energies,
    contracted_energy,
    error_energies,
    full_lambda_max,
    is_full,
    predicted_contraction,
    step_in_sum_of_squares,
    step_size_ratio,
)


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        ("mean", nn.MSELoss()),
        ("sum", nn.MSELoss(reduction="sum")),
        ("half_sum", lambda u, y: 0.5 * (u - y).square().sum()),
    ],
)
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_step_on_the_loss_is_the_converted_step_on_the_sum_of_squares(loss, function, outputs):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    inputs, targets = torch.randn(7, 4).double(), torch.randn(7, outputs).double()
    eta = 0.37
    own = torch.autograd.grad(function(model(inputs), targets), list(model.parameters()))
    plain = torch.autograd.grad(0.5 * (model(inputs) - targets).square().sum(), list(model.parameters()))
    converted = step_in_sum_of_squares(eta, loss=loss, numbers=7 * outputs)
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(eta * a, converted * b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kwargs", "named"), [({"loss": "huber"}, "loss"), ({"numbers": 0}, "numbers")])
def test_a_bad_conversion_is_named(kwargs, named):
    with pytest.raises(ValueError, match=named):
        step_in_sum_of_squares(0.1, **({"loss": "mean", "numbers": 4} | kwargs))


def descend(kernel, residual, steps):
    """The naive loop: one multiplication by I - eta G a step."""
    residual = residual.clone()
    for eta in steps:
        residual = residual - eta * (kernel @ residual)
    return residual


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(0, 5), min_size=1, max_size=6),
    steps=st.lists(st.sampled_from([0.01, 0.1, 0.2, 0.35, 0.45]), min_size=0, max_size=30),
    seed=st.integers(0, 2**16),
)
def test_the_prediction_is_what_the_naive_loop_does(values, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor(values, dtype=torch.float64)
    residual = torch.randn(size, generator=generator, dtype=torch.float64)
    after = descend((basis * values) @ basis.T, residual, steps)
    expected = float(after.square().sum() / residual.square().sum())
    counted = {eta: steps.count(eta) for eta in set(steps)}
    assert predicted_contraction(values, basis, residual, counted) == pytest.approx(expected, rel=1e-9, abs=1e-24)


def test_slow_directions_and_many_steps_agree_with_fifty_digits():
    values = torch.tensor([1e-14, 1e-9, 1e-3, 0.7, 1.9], dtype=torch.float64)
    energies = torch.tensor([1.0, 2.0, 0.5, 3.0, 1e-3], dtype=torch.float64)
    steps = {1e-3: 1_000_000, 1.0: 500, 0.3: 77}
    with mpmath.workdps(50):
        expected = mpmath.mpf(0)
        for value, energy in zip(values.tolist(), energies.tolist(), strict=True):
            factor = mpmath.mpf(1)
            for eta, count in steps.items():
                factor *= (1 - mpmath.mpf(eta) * mpmath.mpf(value)) ** (2 * count)
            expected += mpmath.mpf(energy) * factor
        lost = float(sum(mpmath.mpf(e) for e in energies.tolist()) - expected)
    found = contracted_energy(values, energies, steps)
    assert found == pytest.approx(float(expected), rel=1e-12)
    assert float(energies.sum()) - found == pytest.approx(lost, rel=1e-9)


def test_the_slowest_direction_alone_keeps_its_digits():
    """1 - eta lambda rounds to 1 here, and yet very many such steps shrink the error."""
    values, energies = torch.tensor([1e-17], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert contracted_energy(values, energies, {1.0: 10**15}) == pytest.approx(math.exp(-0.02), rel=1e-12)


def test_many_different_rates_are_cut_into_pieces(monkeypatch):
    values, energies = torch.rand(7).double(), torch.rand(7).double()
    steps = {0.1 + 1e-3 * k: 1 + k % 3 for k in range(50)}
    whole = contracted_energy(values, energies, steps)
    monkeypatch.setattr("lightning_conv.kernels.contraction.ENTRIES_AT_ONCE", 20)
    assert contracted_energy(values, energies, steps) == pytest.approx(whole, rel=1e-13)


def test_above_the_limit_the_error_grows_and_at_one_over_lambda_it_is_gone():
    values, vectors = torch.tensor([1.0, 4.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    residual = torch.tensor([0.0, 1.0])
    assert step_size_ratio(0.25, 4.0) == 0.5
    assert predicted_contraction(values, vectors, residual, {0.25: 1}) == 0.0
    assert predicted_contraction(values, vectors, residual, {0.49: 10}) < 1 < step_size_ratio(0.51, 4.0)
    assert predicted_contraction(values, vectors, residual, {0.51: 10}) > 1
    # A direction without error does not blow up, however unstable.
    assert predicted_contraction(values, vectors, torch.tensor([1.0, 0.0]), {1.9: 10_000}) < 1


def test_energies_add_up_to_the_squared_error():
    vectors = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    residual = torch.randn(3, 2, dtype=torch.float64)
    assert float(error_energies(vectors, residual).sum()) == pytest.approx(float(residual.square().sum()), rel=1e-13)


def test_a_residual_of_another_size_or_of_zeros_is_refused():
    values, vectors = torch.ones(3).double(), torch.eye(3).double()
    with pytest.raises(ValueError, match="residual: 2 numbers"):
        predicted_contraction(values, vectors, torch.ones(2), {0.1: 1})
    with pytest.raises(ValueError, match="residual: is zero"):
        predicted_contraction(values, vectors, torch.zeros(3), {0.1: 1})


def test_descent_on_a_linear_model_does_what_is_predicted():
    model = nn.Linear(5, 2).double()
    inputs, targets = torch.randn(8, 5).double(), torch.randn(8, 2).double()
    gram = ntk_gram(model, inputs, outputs="full", precision="certified")
    values, vectors = torch.linalg.eigh(gram.matrix)
    residual = (model(inputs) - targets).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    measured = float((model(inputs) - targets).detach().square().sum() / residual.square().sum())
    eta = step_in_sum_of_squares(0.2, loss="mean", numbers=16)
    assert predicted_contraction(values, vectors, residual, {eta: 25}) == pytest.approx(measured, rel=1e-11)


class Columns(nn.Module):
    """u = x W with a (n, C, P) tensor of derivatives as its input: any kernel can be had from it."""

    def __init__(self, parameters):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(parameters, dtype=torch.float64))

    def forward(self, jacobian):
        return jacobian @ self.weight


def intervals(jacobian):
    """What is said of lambda_max of the full kernel, from each kind of kernel, and what it is."""
    model = Columns(jacobian.shape[-1])
    said = {}
    for outputs in ("full", "trace", "sum", "projected"):
        gram = ntk_gram(model, jacobian, outputs=outputs, precision="certified")
        said[outputs] = full_lambda_max(gram, kernel_spectrum(gram))
    rows = jacobian.reshape(-1, jacobian.shape[-1])
    return said, float(torch.linalg.matrix_norm(rows, 2) ** 2)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 5),
    classes=st.integers(1, 4),
    rank=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_every_kind_of_kernel_bounds_lambda_max_of_the_full_one(n, classes, rank, seed):
    jacobian = torch.randn(n, classes, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    said, truth = intervals(jacobian)
    for outputs, (lower, upper) in said.items():
        assert lower * (1 - 1e-12) <= truth <= upper * (1 + 1e-12), outputs
    assert said["full"][1] - said["full"][0] < 1e-9 * truth
    if classes == 1:
        assert all(upper - lower < 1e-9 * truth for lower, upper in said.values())


def test_lambda_max_of_the_trace_kernel_alone_bounds_it_from_neither_side():
    """Both ends of the interval are attained: C equal blocks, and one parameter that moves output c of sample c."""
    classes = 3
    features = torch.randn(4, 5, dtype=torch.float64)
    equal = torch.einsum("nf,cd->ncdf", features, torch.eye(classes).double()).reshape(4, classes, classes * 5)
    said, truth = intervals(equal)
    assert said["trace"][0] == pytest.approx(truth, rel=1e-9)
    single = torch.eye(classes, dtype=torch.float64)[:, :, None]
    said, truth = intervals(single)
    trace = ntk_gram(Columns(1), single, precision="certified")
    assert truth == pytest.approx(3.0)
    assert kernel_spectrum(trace).lambda_max.upper < 1.001 < truth
    assert said["trace"][1] == pytest.approx(truth, rel=1e-9)


def test_the_sum_kernel_says_nothing_from_above():
    jacobian = torch.tensor([[[1.0], [-1.0]], [[2.0], [-2.0]]], dtype=torch.float64)  # outputs that cancel
    said, truth = intervals(jacobian)
    assert said["sum"][0] < 1e-9 < truth
    assert said["sum"][1] == math.inf
    assert said["projected"] == (0.0, math.inf)


def test_for_one_output_every_kind_is_the_full_kernel():
    for outputs in ("full", "trace", "sum", "projected"):
        assert is_full(ntk_gram(nn.Linear(3, 1), torch.randn(4, 3), outputs=outputs))
        assert is_full(ntk_gram(nn.Linear(3, 2), torch.randn(4, 3), outputs=outputs)) == (outputs == "full")


def test_what_is_left_along_each_eigenvector_is_where_further_steps_go_on():
    values, energies = torch.tensor([0.1, 1.0, 4.0, 0.0]).double(), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    steps, more = {0.25: 3, 0.4: 1}, {0.1: 5}
    left = contracted_energies(values, energies, steps)
    by_hand = [
        float(e) * ((1 - 0.25 * v) ** 3 * (1 - 0.4 * v)) ** 2 for v, e in zip(values.tolist(), energies, strict=True)
    ]
    assert left.tolist() == pytest.approx(by_hand, rel=1e-12, abs=1e-300)
    assert contracted_energy(values, left, more) == pytest.approx(
        contracted_energy(values, energies, steps | more), rel=1e-12
    )
