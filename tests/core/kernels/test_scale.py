"""Quotients of kernels have no scale: drift, alignment and predicted contraction are the same at every size, or refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_conv import (
    centred_alignment,
    fully_connected_limit,
    h_infinity,
    kernel_drift,
    kernel_spectrum,
    predicted_contraction,
    residual_limit,
)
from lightning_conv.kernels.contraction import full_lambda_max
from lightning_conv.kernels.drift import relative_frobenius_change

SIZES = [1e-310, 1e-170, 1e-81, 1e81, 1e160, 1e300]


def kernel(seed):
    factor = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


@pytest.mark.parametrize("size", SIZES)
def test_drift_and_alignment_have_no_scale(size):
    one, other = kernel(0), kernel(1)
    # A subnormal kernel has 20 bits only.
    close = 1e-4 if size < 1e-307 else 1e-12
    assert relative_frobenius_change(one * size, other * size) == pytest.approx(
        float((one - other).norm() / other.norm()), rel=close
    )
    assert centred_alignment(one * size, other * size) == pytest.approx(centred_alignment(one, other), rel=close)
    found, plain = kernel_drift(one * size, other * size), kernel_drift(one, other)
    assert found.relative_spectral == pytest.approx(plain.relative_spectral, rel=close)
    assert found.lambda_min_ratio.lower <= plain.lambda_min_ratio.upper
    assert plain.lambda_min_ratio.lower <= found.lambda_min_ratio.upper


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_kernels_with_nan_or_infinity_are_refused_by_name(value):
    broken = kernel(0)
    broken[1, 1] = value
    for call, name in (
        (lambda: centred_alignment(broken, kernel(1)), "x"),
        (lambda: centred_alignment(kernel(1), broken), "y"),
        (lambda: kernel_drift(broken, kernel(1)), "gram"),
        (lambda: kernel_drift(kernel(1), broken), "reference"),
        (lambda: kernel_spectrum(broken), "gram"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: contains NaN or infinity; check the network"):
            call()


@pytest.mark.parametrize("size", SIZES)
def test_the_predicted_contraction_has_no_scale(size):
    values, vectors = torch.linalg.eigh(kernel(2))
    residual = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain = predicted_contraction(values, vectors, residual, {0.01: 7})
    assert predicted_contraction(values, vectors, residual * size, {0.01: 7}) == pytest.approx(plain, rel=1e-4)


def test_a_residual_with_nan_is_refused_by_name():
    values, vectors = torch.linalg.eigh(kernel(2))
    with pytest.raises(ValueError, match="residual: contains NaN"):
        predicted_contraction(values, vectors, torch.tensor([1.0, math.nan, 0, 0, 0], dtype=torch.float64), {0.1: 1})


LIMITS = {
    "fully connected": lambda x: fully_connected_limit(x, 2, nn.Tanh()),
    "residual": lambda x: residual_limit(x, 2, nn.Tanh()),
    "two layers": h_infinity,
}


@pytest.mark.parametrize("limit", sorted(LIMITS))
@pytest.mark.parametrize(("size", "words"), [(1e160, "overflow; divide"), (1e-160, "vanish; multiply")])
def test_a_limit_whose_products_leave_the_range_is_refused_in_a_sentence(limit, size, words):
    with pytest.raises(ValueError, match=rf"inputs: of size up to .*, whose products {words} by a constant"):
        LIMITS[limit](kernel(0) * size)


def test_a_tiny_row_beside_others_is_not_taken_for_zero():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1e-170], [1e-170, 1e-170]], dtype=torch.float64)
    found = h_infinity(rows)
    assert float(found[0, 1]) == 0
    # x . y (pi - theta) / (2 pi) with theta = pi / 4
    assert float(found[0, 2]) == pytest.approx(1e-170 * 3 / 8, rel=1e-12)


@pytest.mark.parametrize("size", [1e-300, 0.1, 1e300])
def test_the_ends_of_the_full_lambda_max_are_rounded_outwards(size):
    from fractions import Fraction
    from types import SimpleNamespace

    spectrum = kernel_spectrum(kernel(4) * size)
    for outputs in ("trace", "sum"):
        gram = SimpleNamespace(n_outputs=3, outputs=outputs, trace=1.0e308, floor=0.0, jacobian_error=0.1)
        low, high = full_lambda_max(gram, spectrum)
        assert Fraction(low) * 3 <= Fraction(spectrum.lambda_max.lower)
        if outputs == "trace":
            assert high == math.inf or Fraction(high) >= min(
                3 * Fraction(spectrum.lambda_max.upper), Fraction(1.0e308) * (1 + Fraction(0.1)) ** 2
            )
