"""``kernel_drift`` against NumPy and the definitions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_conv import Bounded, Drift, Spectrum, centred_alignment, kernel_drift, kernel_spectrum, ntk_gram
from lightning_conv.theory.papers.du import lambda_min_share_criterion


def verdict_of(drift: Drift) -> str:
    return lambda_min_share_criterion(drift.lambda_min_ratio).verdict


def kernels(seed=0, size=7, scale=0.3):
    random = np.random.default_rng(seed)
    features = random.standard_normal((size, 20))
    moved = features + scale * random.standard_normal((size, 20))
    return torch.from_numpy(moved @ moved.T), torch.from_numpy(features @ features.T)


def grams(n=6):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    inputs = torch.randn(n, 4)
    before = ntk_gram(model, inputs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return ntk_gram(model, inputs), before


@pytest.mark.parametrize("seed", range(4))
def test_every_number_is_its_definition(seed):
    now, then = kernels(seed)
    drift = kernel_drift(now, then)
    g, g0 = now.numpy(), then.numpy()
    norm = np.linalg.norm
    assert drift.relative_frobenius == pytest.approx(norm(g - g0) / norm(g0), rel=1e-12)
    assert drift.relative_spectral == pytest.approx(norm(g - g0, 2) / norm(g0, 2), rel=1e-12)
    smallest = np.linalg.eigvalsh(g0)[0]
    assert drift.spectral_over_lambda_min == pytest.approx(norm(g - g0, 2) / smallest, rel=1e-10)
    assert drift.lambda_min_ratio.value == pytest.approx(np.linalg.eigvalsh(g)[0] / smallest, rel=1e-10)
    h = np.eye(7) - 1 / 7
    left, right = h @ g @ h, h @ g0 @ h
    assert drift.alignment == pytest.approx((left * right).sum() / norm(left) / norm(right), rel=1e-12)
    assert drift.floor == 0


def test_no_drift_from_itself():
    gram, _ = kernels()
    drift = kernel_drift(gram, gram)
    assert drift.relative_frobenius == drift.relative_spectral == drift.spectral_over_lambda_min == 0
    assert drift.alignment == pytest.approx(1, abs=1e-14)
    assert verdict_of(drift) == "consistent"


@pytest.mark.parametrize(("a", "b"), [(1, 0), (3.5, 0), (0.01, 100.0), (2, -5)])
def test_alignment_does_not_see_scale_and_constants(a, b):
    gram, _ = kernels()
    assert centred_alignment(a * gram + b, gram) == pytest.approx(1, abs=1e-10)


def test_alignment_tells_orthogonal_kernels_apart():
    one, other = torch.tensor([1.0, -1, 0, 0]).double(), torch.tensor([0, 0, 1.0, -1]).double()
    assert centred_alignment(torch.outer(one, one), torch.outer(other, other)) == pytest.approx(0, abs=1e-15)
    assert 0 < centred_alignment(*kernels(scale=3.0)) < 0.95


def test_alignment_of_a_constant_kernel_is_not_defined():
    gram, _ = kernels()
    assert math.isnan(centred_alignment(gram, torch.ones_like(gram)))


def test_interval_holds_the_exact_ratio(exact_eigenvalues):
    for seed in range(3):
        now, then = kernels(seed)
        ratio = kernel_drift(now, then).lambda_min_ratio
        exact = exact_eigenvalues(now)[0] / exact_eigenvalues(then)[0]
        assert ratio.lower <= exact <= ratio.upper
        assert ratio.upper - ratio.lower < 1e-10
        assert ratio.certified


@pytest.mark.parametrize("now", [(1.0, 2.0), (-2.0, 1.0), (-2.0, -1.0), (0.0, 3.0)])
@pytest.mark.parametrize("then", [(0.5, 1.0), (1e-3, 4.0)])
def test_interval_holds_every_quotient_of_the_two_intervals(now, then):
    gram, _ = kernels()

    def spectrum(lower, upper):
        top = Bounded(10.0, 10.0, 10.0, True, "given")
        return Spectrum(torch.ones(7).double(), Bounded((lower + upper) / 2, lower, upper, True, "given"), top, 0.0)

    ratio = kernel_drift(gram, gram, spectrum=spectrum(*now), reference_spectrum=spectrum(*then)).lambda_min_ratio
    quotients = [a / b for a in np.linspace(*now, 9) for b in np.linspace(*then, 9)]
    assert ratio.lower <= min(quotients) + 1e-12
    assert ratio.upper >= max(quotients) - 1e-12
    assert (ratio.lower, ratio.upper) == pytest.approx((min(quotients), max(quotients)))


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "consistent"), (0.68, "consistent"), (0.66, "refuted")])
def test_two_thirds_are_judged_by_the_ratio(factor, verdict):
    gram, _ = kernels()
    assert verdict_of(kernel_drift(factor * gram, gram)) == verdict


def test_two_thirds_are_undecided_where_the_floor_is_as_large_as_the_eigenvalue():
    now, then = grams()
    coarse = dataclasses.replace(now, floor=2 * float(torch.linalg.eigvalsh(now.matrix)[0]))
    drift = kernel_drift(coarse, then)
    assert verdict_of(drift) == "undecided"
    assert drift.lambda_min_ratio.lower < 0.5 < 2 / 3 < drift.lambda_min_ratio.upper


def test_against_a_singular_reference_the_ratio_has_no_upper_bound():
    gram, _ = kernels()
    singular = torch.ones_like(gram)
    assert kernel_drift(gram, singular).lambda_min_ratio.upper == math.inf
    assert verdict_of(kernel_drift(gram, singular)) == "consistent"  # above two thirds of nothing
    assert verdict_of(kernel_drift(singular, singular)) == "undecided"


def test_floor_adds_up_what_is_known_about_both_kernels():
    now, then = grams()
    drift = kernel_drift(now, then)
    expected = sum(g.floor + 2 * g.jacobian_error * np.trace(g.matrix.numpy()) for g in (now, then))
    assert drift.floor == pytest.approx(expected / np.linalg.norm(then.matrix.numpy()), rel=1e-12)


def test_floor_bounds_the_drift_of_one_kernel_in_two_precisions():
    model, inputs = nn.Sequential(nn.Linear(4, 30), nn.Softplus(), nn.Linear(30, 2)), torch.randn(6, 4)
    drift = kernel_drift(ntk_gram(model, inputs, precision="fast"), ntk_gram(model, inputs, precision="certified"))
    assert 0 < drift.relative_frobenius <= drift.floor


def test_spectra_at_hand_are_used():
    now, then = kernels()
    given = kernel_drift(now, then, spectrum=kernel_spectrum(now), reference_spectrum=kernel_spectrum(then))
    assert given == kernel_drift(now, then)


def test_kernels_that_do_not_compare_are_refused():
    now, then = grams()
    with pytest.raises(ValueError, match=r"reference: shape \(5, 5\) against \(6, 6\)"):
        kernel_drift(now, grams(5)[1])
    with pytest.raises(ValueError, match="reference: outputs='sum' against 'trace'"):
        kernel_drift(now, dataclasses.replace(then, outputs="sum"))
    with pytest.raises(ValueError, match="reference: batch_norm='frozen' against 'eval'"):
        kernel_drift(now, dataclasses.replace(then, batch_norm="frozen"))
    with pytest.raises(ValueError, match="reference: n_outputs=3 against 2"):
        kernel_drift(now, dataclasses.replace(then, n_outputs=3))
    with pytest.raises(ValueError, match="reference: the matrix is zero"):
        kernel_drift(now.matrix, torch.zeros_like(now.matrix))
    with pytest.raises(ValueError, match=r"gram: .*float32"):
        kernel_drift(now.matrix.float(), then.matrix.float())


def test_kernels_over_different_parameters_have_no_drift():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    inputs = torch.randn(5, 3)
    whole, head = ntk_gram(model, inputs), ntk_gram(model, inputs, parameters=["2.weight", "2.bias"])
    with pytest.raises(ValueError, match=r"only one of them over 0\.bias, 0\.weight"):
        kernel_drift(head, whole)
    model[0].requires_grad_(False)
    assert kernel_drift(head, ntk_gram(model, inputs)).relative_frobenius == 0
    with pytest.raises(ValueError, match=r"parameters: \['2\.wieght'\]"):
        ntk_gram(model, inputs, parameters=["2.wieght"])
