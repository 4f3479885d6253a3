"""Limit kernels against closed forms, two-dimensional quadrature, adaptive integration, Monte Carlo and finite widths."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from torch import nn

from lightning_conv import (
    c_sigma,
    convolutional_limit,
    fully_connected_limit,
    h_infinity,
    kernel_spectrum,
    residual_limit,
)
from lightning_conv.kernels.infinite import ArcCosineDual, HermiteDual
from lightning_conv.kernels.infinite.hermite import gauss_hermite
from lightning_conv.networks.activation import derivative
from lightning_conv.networks.analytic import softplus

SOFTPLUS = softplus(1.0)


def samples(n=5, d=4, seed=0, unit=True):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True) if unit else x


def images(n=3, channels=2, size=(3, 4), seed=0):
    x = torch.randn(n, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.flatten(1).norm(dim=1)[:, None, None, None]


def product_rule(function, a, b, rho, order=120):
    """E[f(u) f(v)] by the two-dimensional Gauss-Hermite rule, numpy's nodes."""
    z, w = np.polynomial.hermite_e.hermegauss(order)
    w = w / w.sum()
    u = math.sqrt(a) * z[:, None] + 0 * z[None, :]
    v = math.sqrt(b) * (rho * z[:, None] + math.sqrt(max(1 - rho**2, 0)) * z[None, :])
    values = function(torch.from_numpy(u)) * function(torch.from_numpy(v))
    return float((values.numpy() * w[:, None] * w[None, :]).sum())


def pairwise(dual, a, b, rho):
    one = torch.ones(1, dtype=torch.float64)
    arguments = (one[:, None] * rho * math.sqrt(a * b), a * one, b * one)
    return float(dual.moment(*arguments)), float(dual.derivative_moment(*arguments))


def test_the_quadrature_is_exact_for_polynomials_of_its_degree():
    nodes, basis = gauss_hermite(9)
    moments = [float((nodes**k * basis[0].square()).sum()) for k in range(18)]
    exact = [0.0 if k % 2 else float(math.prod(range(1, k, 2))) for k in range(18)]
    assert moments == pytest.approx(exact, rel=1e-11, abs=1e-7)
    assert torch.allclose(basis @ basis.T, torch.eye(9, dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize("rho", [-1.0, -0.7, 0.0, 0.4, 0.999, 1.0])
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.3, 2.0), (0.0, 1.5)])
@pytest.mark.parametrize("activation", [SOFTPLUS, torch.tanh], ids=["softplus", "tanh"])
def test_the_hermite_expansion_is_the_two_dimensional_quadrature(activation, a, b, rho):
    moment, slopes = pairwise(HermiteDual(activation, 256), a, b, rho)
    rho = rho if a > 0 else 0.0
    assert moment == pytest.approx(product_rule(activation, a, b, rho), rel=1e-7, abs=1e-9)
    assert slopes == pytest.approx(product_rule(lambda z: derivative(activation, z), a, b, rho), rel=1e-7)


def test_the_hermite_expansion_is_the_adaptive_integral():
    a, b, rho = 0.8, 1.3, 0.55

    def density(y, x):
        form = (x * x - 2 * rho * x * y + y * y) / (2 * (1 - rho**2))
        return math.exp(-form) / (2 * math.pi * math.sqrt(1 - rho**2))

    def sp(z):
        return math.log1p(math.exp(z))

    integral, _ = dblquad(
        lambda y, x: sp(math.sqrt(a) * x) * sp(math.sqrt(b) * y) * density(y, x), -9, 9, -9, 9, epsabs=1e-10
    )
    assert pairwise(HermiteDual(SOFTPLUS, 64), a, b, rho)[0] == pytest.approx(integral, rel=1e-9)


@pytest.mark.parametrize("rho", [-1.0, -0.3, 0.0, 0.6, 1.0])
def test_the_arc_cosine_forms_are_the_integrals_in_polar_coordinates(rho):
    """relu is homogeneous: E[f(u) f(v)] is a radial moment times an integral over the circle, here the midpoint rule."""
    a, b = 0.7, 2.2
    angles = (np.arange(400_000) + 0.5) * 2 * np.pi / 400_000
    u, v = np.cos(angles), rho * np.cos(angles) + math.sqrt(1 - rho**2) * np.sin(angles)
    degree_1 = 2 * (np.maximum(u, 0) * np.maximum(v, 0)).mean() * math.sqrt(a * b)
    degree_0 = ((u >= 0) & (v >= 0)).mean()
    moment, slopes = pairwise(ArcCosineDual(), a, b, rho)
    assert moment == pytest.approx(degree_1, abs=1e-9)
    assert slopes == pytest.approx(degree_0, abs=1e-5)


def test_sharp_softplus_tends_to_relu_and_the_error_covers_the_distance_to_a_finer_rule():
    x = samples()
    relu = fully_connected_limit(x, 2, nn.ReLU())
    gaps = [float((fully_connected_limit(x, 2, softplus(beta)).matrix - relu.matrix).norm()) for beta in (4.0, 16.0)]
    assert gaps[1] < gaps[0] / 3
    sharp = fully_connected_limit(x, 2, softplus(100.0))
    assert 1e-6 < sharp.error < 0.02  # it cannot be resolved by 1,024 nodes, and says so
    assert float((sharp.matrix - relu.matrix).norm()) < sharp.error + gaps[1]


def test_relu_through_hermite_agrees_with_the_closed_form_within_its_error():
    x = samples()
    exact = fully_connected_limit(x, 3, nn.ReLU())
    found = fully_connected_limit(x, 3, lambda z: z.clamp(min=0))
    assert exact.order == 0
    assert float((found.matrix - exact.matrix).norm()) <= 3 * found.error
    assert exact.error < 1e-13


def test_closed_forms_say_what_rounding_does_to_nearly_parallel_inputs():
    """A diagonal is exact; two inputs at an angle of 1e-6 lose some digits in the arc cosine, and the error covers them."""
    theta = 1e-6
    x = torch.tensor([[0.7, 0.0], [1.3 * math.cos(theta), 1.3 * math.sin(theta)]], dtype=torch.float64)
    kernel = fully_connected_limit(x, 1, nn.ReLU())
    exact = 2 * h_infinity(x)
    assert torch.allclose(kernel.matrix.diagonal(), torch.tensor([0.49, 1.69], dtype=torch.float64), rtol=1e-15)
    assert float((kernel.matrix - exact).norm()) <= kernel.error
    assert 1e-12 < kernel.error < 1e-8


def test_c_sigma():
    z = np.linspace(-12, 12, 200_001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    for activation in (SOFTPLUS, torch.tanh, torch.sigmoid):
        second = np.trapezoid(activation(torch.from_numpy(z)).numpy() ** 2 * density, z)
        assert c_sigma(activation) == pytest.approx(1 / second, rel=1e-10)
    assert c_sigma(nn.ReLU()) == pytest.approx(2.0, rel=1e-14)
    with pytest.raises(ValueError, match="not zero"):
        c_sigma(torch.zeros_like)
    with pytest.raises(ValueError, match="need an elementwise function"):
        derivative(lambda z: z.sum(), torch.ones(3))


def test_h_infinity_is_the_mean_over_random_neurons():
    x = samples(6, 3, unit=False)
    exact = h_infinity(x)
    w = torch.randn(400_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    active = (x @ w.T >= 0).double()
    probability = active @ active.T / len(w)
    error = (x @ x.T).abs() * (probability * (1 - probability) / len(w)).sqrt()
    assert ((exact - (x @ x.T) * probability).abs() <= 4.5 * error + 1e-12).all()
    assert torch.allclose(h_infinity(samples(6, 3)), h_infinity(samples(6, 3)).T)


def test_h_infinity_resolves_inputs_that_are_nearly_parallel():
    """theta from the arc cosine would be off by 1e-8 here; the closed form at two unit vectors at a known angle is not."""
    theta = 1e-7
    x = torch.tensor([[1.0, 0.0], [math.cos(theta), math.sin(theta)]], dtype=torch.float64)
    share = float(h_infinity(x)[0, 1]) / float(x[0] @ x[1])
    assert 0.5 - share == pytest.approx(theta / (2 * math.pi), rel=1e-6)
    assert kernel_spectrum(h_infinity(x)).lambda_min.value > 0
    parallel = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    assert kernel_spectrum(h_infinity(parallel)).lambda_min.value == pytest.approx(0.0, abs=1e-15)


def test_one_layer_of_relu_is_twice_h_infinity():
    x = samples(unit=False)
    assert torch.allclose(fully_connected_limit(x, 1, nn.ReLU()).matrix, 2 * h_infinity(x), rtol=1e-13)
    assert torch.equal(residual_limit(x, 1, nn.ReLU()).matrix, fully_connected_limit(x, 1, nn.ReLU()).matrix)


def naive_fully_connected(x, depth, activation, constant):
    """Definition 5.1, pair by pair, by the two-dimensional rule."""
    k = (x @ x.T).numpy()
    for h in range(depth):
        now, last = np.empty_like(k), h == depth - 1
        for i in range(len(k)):
            for j in range(len(k)):
                a, b = k[i, i], k[j, j]
                function = (lambda z: derivative(activation, z)) if last else activation
                mean = product_rule(function, a, b, min(k[i, j] / math.sqrt(a * b), 1.0), order=60)
                now[i, j] = constant * mean * (k[i, j] if last else 1.0)
        k = now
    return torch.from_numpy(k)


def naive_residual(x, depth, activation, constant, c_res):
    """Definition 6.1 with b_i beside E sigma(v_j) and the covariance of K^(H-1), pair by pair."""
    k, step = (x @ x.T).numpy(), c_res / depth

    def mean(variance):
        z, w = np.polynomial.hermite_e.hermegauss(60)
        return float(activation(torch.from_numpy(math.sqrt(variance) * z)).numpy() @ w / w.sum())

    def pair(function, i, j):
        return product_rule(function, k[i, i], k[j, j], min(k[i, j] / math.sqrt(k[i, i] * k[j, j]), 1.0), order=60)

    n, b = len(k), None
    for h in range(1, depth + 1):
        now = np.empty_like(k)
        means = [mean(k[i, i]) for i in range(n)]
        for i in range(n):
            for j in range(n):
                if h == depth:
                    now[i, j] = step**2 * k[i, j] * pair(lambda z: derivative(activation, z), i, j)
                elif h == 1:
                    now[i, j] = constant * pair(activation, i, j)
                else:
                    cross = step * (b[i] * means[j] + b[j] * means[i])
                    now[i, j] = k[i, j] + cross + step**2 * pair(activation, i, j)
        b = [math.sqrt(constant) * e for e in means] if h == 1 else [b[i] + step * means[i] for i in range(n)]
        k = now
    return torch.from_numpy(k)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_recursions_are_their_definitions_pair_by_pair(depth):
    x = samples(3, unit=False) / 2
    constant = c_sigma(SOFTPLUS)
    found = fully_connected_limit(x, depth, SOFTPLUS)
    assert torch.allclose(found.matrix, naive_fully_connected(x, depth, SOFTPLUS, constant), rtol=1e-8)
    assert len(found.covariances) == found.depth == depth
    if depth > 1:
        naive = naive_residual(x, depth, SOFTPLUS, constant, 0.7)
        assert torch.allclose(residual_limit(x, depth, SOFTPLUS, c_res=0.7).matrix, naive, rtol=1e-6)


def test_diagonals_of_the_fully_connected_covariances_are_one_for_unit_inputs():
    covariances = fully_connected_limit(samples(), 4, SOFTPLUS).covariances
    for covariance in covariances:
        assert torch.allclose(covariance.diagonal(), torch.ones(5, dtype=torch.float64), rtol=1e-11)


def test_a_convolution_of_one_pixel_is_the_residual_network():
    """With one position a patch holds the sample and zeros."""
    x = samples(4, 3)
    for depth in (1, 2, 4):
        found = convolutional_limit(x[:, :, None, None], depth, SOFTPLUS, c_res=0.6)
        assert torch.allclose(found.matrix, residual_limit(x, depth, SOFTPLUS, c_res=0.6).matrix, rtol=1e-11)


def test_a_convolution_with_kernel_size_one_treats_positions_as_samples():
    """Then nothing crosses positions, and K^(H) sums the residual network's kernel over equal positions."""
    x = images(3)
    found = convolutional_limit(x, 3, SOFTPLUS, kernel_size=1).matrix
    rows = x.flatten(2).transpose(1, 2).reshape(-1, 2)  # sample by sample, position by position
    pixels = residual_limit(rows, 3, SOFTPLUS).matrix.view(3, 12, 3, 12)
    assert torch.allclose(found, pixels.diagonal(dim1=1, dim2=3).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_convolutional_recursion_is_its_definition_entry_by_entry(depth):
    """Patches as index sets, the trace over D_l and D_r as a double loop."""
    x, c_res, n, (height, width) = images(2, size=(2, 3)), 0.8, 2, (2, 3)
    places = [(r, c) for r in range(height) for c in range(width)]
    p, step, constant = len(places), c_res / depth, c_sigma(SOFTPLUS)
    dual = HermiteDual(SOFTPLUS, 128)

    def neighbour(place, offset):
        r, c = place[0] + offset[0], place[1] + offset[1]
        return places.index((r, c)) if 0 <= r < height and 0 <= c < width else None

    offsets = [(dr, dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)]

    def traced(s):
        k = torch.zeros_like(s)
        for i in range(n):
            for j in range(n):
                for left in range(p):
                    for right in range(p):
                        for offset in offsets:
                            one, two = neighbour(places[left], offset), neighbour(places[right], offset)
                            if one is not None and two is not None:
                                k[i * p + left, j * p + right] += s[i * p + one, j * p + two]
        return k

    pixels = x.flatten(2).transpose(1, 2).reshape(n * p, -1)
    k = traced(pixels @ pixels.T)
    s = constant * dual.moment(k, k.diagonal(), k.diagonal())
    b = math.sqrt(constant) * dual.mean(k.diagonal())
    for _ in range(2, depth):
        k = traced(s)
        e = dual.mean(k.diagonal())
        s = s + step * (b[:, None] * e + e[:, None] * b) + step**2 * dual.moment(k, k.diagonal(), k.diagonal())
        b = b + step * e
    k = traced(s)
    terms = step**2 * k * dual.derivative_moment(k, k.diagonal(), k.diagonal())
    expected = torch.stack(
        [torch.stack([terms[i * p : (i + 1) * p, j * p : (j + 1) * p].trace() for j in range(n)]) for i in range(n)]
    )
    assert torch.allclose(convolutional_limit(x, depth, SOFTPLUS, c_res=c_res).matrix, expected, rtol=1e-9)


def test_blank_pixels_are_no_division_by_zero():
    x = images(3, 1, (5, 5))
    x[:, :, :, 3:] = 0
    x[:, :, :2] = 0
    for activation in (SOFTPLUS, nn.ReLU()):
        kernel = convolutional_limit(x, 2, activation)
        assert kernel.matrix.isfinite().all()
        assert kernel.lambda_0.value > 0


def test_lambda_0_has_the_error_of_the_quadrature_in_its_interval():
    kernel = fully_connected_limit(samples(), 2, SOFTPLUS)
    exact = kernel_spectrum(kernel.matrix).lambda_min
    assert kernel.lambda_0.value == exact.value
    assert kernel.lambda_0.upper - exact.upper == pytest.approx(kernel.error, rel=1e-3)
    assert exact.lower - kernel.lambda_0.lower == pytest.approx(kernel.error, rel=1e-3)
    assert not kernel.lambda_0.certified
    assert exact.certified


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fully_connected_limit(samples(), 0, SOFTPLUS), "depth: 0"),
        (lambda: residual_limit(samples(), 2, SOFTPLUS, c_res=1.0), r"c_res: 1\.0"),
        (lambda: fully_connected_limit(torch.ones(3), 1, SOFTPLUS), r"inputs: shape \(3,\)"),
        (lambda: fully_connected_limit(torch.full((2, 2), math.nan), 1, SOFTPLUS), "NaN"),
        (lambda: h_infinity(torch.zeros(2, 3)), "row 0 is zero"),
        (lambda: convolutional_limit(samples(), 2, SOFTPLUS), r"images: shape \(5, 4\)"),
        (lambda: convolutional_limit(images(), 2, SOFTPLUS, kernel_size=2), "kernel_size: 2"),
        (lambda: convolutional_limit(images() * math.inf, 2, SOFTPLUS), "NaN"),
    ],
)
def test_what_has_no_limit_kernel_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
