"""Features that a cast inside the trunk rounds prove nothing, by any method; what does not depend on them is still said."""

import pytest
import torch
from casting import FORWARD, Layer, RMSNorm
from torch import nn

from lightning_conv import certify_expressivity, find_head, last_hidden_features
from lightning_conv.expressivity import HeldRows
from lightning_conv.expressivity.certificate import watched
from lightning_conv.expressivity.singular import feature_rounding, narrow_rounding
from lightning_conv.networks.narrowing import NarrowedError
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import expressivity_facts, judge_expressivity

PLACE = "'norm' computes in torch.float32 (aten::_to_copy)"


def affine_below_a_norm(narrow=True, inputs=3, width=40, seed=0):
    """In exact arithmetic h_i = s_i W (x_i, 1) with numbers s_i, so that rank [h, 1] is at most inputs + 2."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for name, layer in {
        "first": nn.Linear(inputs, width), "norm": RMSNorm(width, narrow), "head": nn.Linear(width, 1)
    }.items():  # fmt: skip
        model.add_module(name, layer)
    return model


def certify(model, x, **options):
    head = find_head(model, x)
    return certify_expressivity(
        last_hidden_features(model, head, x, dtype=torch.float32),
        recompute=lambda: last_hidden_features(model, head, x, dtype=torch.float64),
        **options,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_of_at_most_5_is_not_certified_as_30(seed):
    model = affine_below_a_norm(seed=seed)
    x = torch.rand(30, 3)
    certificate = certify(model, x)
    assert certificate.verdict == "undecided"
    assert certificate.rank_lower <= 5
    assert certificate.narrow == PLACE
    assert PLACE in certificate.reason
    assert certificate.sigma_min.lower == 0
    assert not certificate.sigma_min.certified
    assert not certificate.sigma_max.certified
    # Without the cast the same numbers are what they are.
    model.norm.narrow = False
    exact = last_hidden_features(model, find_head(model, x), x, dtype=torch.float64)
    singular = torch.linalg.svdvals(torch.cat([exact, torch.ones(30, 1)], 1))
    assert int((singular > 1e-12 * singular[0]).sum()) == 5
    assert certificate.sigma_min.lower <= float(singular[29]) <= certificate.sigma_min.upper
    assert certificate.sigma_max.lower <= float(singular[0]) <= certificate.sigma_max.upper
    assert certify(model, x).rank_lower <= 5


@pytest.mark.parametrize("name", FORWARD)
def test_no_cast_leaves_a_certificate(name):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Layer(FORWARD[name]), nn.Linear(8, 1))
    x = torch.rand(4, 4)
    certificate = certify(model, x)
    assert certificate.verdict == "undecided"
    assert certificate.narrow.startswith("'2' ")
    assert certificate.narrow in certificate.reason
    model[2] = nn.Identity()
    assert certify(model, x).verdict == "certified"


def test_the_allowance_is_that_of_the_narrow_type_even_where_both_evaluations_round_alike():
    exact = torch.randn(5, 7, dtype=torch.float64)
    coarse = exact.float()
    rounded = coarse.double()
    assert feature_rounding(coarse, rounded) == 0
    assert narrow_rounding(coarse, rounded, 2.0**-24) >= float((rounded - exact).norm())
    half = exact.bfloat16().double()
    assert narrow_rounding(half.float(), half, 2.0**-9) >= float((half - exact).norm())


def features(n=4, width=6):
    torch.manual_seed(2)
    return torch.randn(n, width, dtype=torch.float64)


@pytest.mark.parametrize("narrow", [None, ""])
def test_what_was_watched_and_not_found_changes_nothing(narrow):
    certificate = certify_expressivity(features(), narrow=narrow)
    assert certificate.verdict == "certified"
    assert certificate.narrow == narrow
    assert certificate.sigma_min.certified


@pytest.mark.parametrize("method", ["singular", "alignment", "distinct"])
@pytest.mark.parametrize("streamed", [False, True])
def test_every_method_is_undecided(method, streamed):
    h = features()
    options = {"targets": torch.randn(4, 2), "entering": features(4, 3), "feature_error": 1e-9}
    rows = HeldRows(h) if streamed else h
    assert certify_expressivity(rows, method=method, **options).rank_lower == 4
    certificate = certify_expressivity(rows, method=method, narrow=PLACE, **options)
    assert (certificate.verdict, certificate.rank_lower, certificate.narrow) == ("undecided", 0, PLACE)
    bounds = [certificate.sigma_min, certificate.sigma_max, certificate.distance, certificate.residual]
    assert not any(bounded.certified for bounded in bounds if bounded is not None)


def test_many_samples_are_undecided_too():
    torch.manual_seed(3)
    h = torch.randn(600, 700, dtype=torch.float64)  # by Cholesky factors
    assert certify_expressivity(h, narrow="").verdict == "certified"
    assert certify_expressivity(h, narrow=PLACE).verdict == "undecided"


def test_targets_that_are_out_of_reach_by_rounded_features_are_undecided():
    targets = torch.randn(9, 2)
    assert certify_expressivity(features(9, 3), targets=targets).verdict == "refuted"
    assert certify_expressivity(features(9, 3), targets=targets, narrow=PLACE).verdict == "undecided"


def test_what_does_not_depend_on_the_numbers_is_still_refuted_without_a_certified_rank():
    narrow_head = certify_expressivity(features(9, 3), narrow=PLACE)
    assert narrow_head.verdict == "refuted"
    assert narrow_head.reason.startswith("too narrow")
    assert (narrow_head.sigma_min.lower, narrow_head.sigma_min.upper, narrow_head.rank_lower) == (0, 0, 0)
    assert "is certified)" not in narrow_head.reason
    h = features()
    h[1] = h[0]
    twice = certify_expressivity(h, feature_error=1e-9, same_inputs=lambda i, j: True, narrow=PLACE)
    assert twice.verdict == "refuted"
    assert "are equal" in twice.reason
    assert "is certified" not in twice.reason.replace("no rank is certified", "")


def test_bounds_without_an_allowance_for_the_cast_are_void():
    certificate = watched(certify_expressivity(features()), PLACE, allowed_for=False)
    assert (certificate.sigma_min.lower, certificate.sigma_min.upper) == (0, float("inf"))


def test_the_error_carries_the_rounded_features():
    model, x = affine_below_a_norm(), torch.rand(30, 3)
    with pytest.raises(NarrowedError) as caught:
        last_hidden_features(model, find_head(model, x), x, dtype=torch.float64)
    assert caught.value.features.shape == (30, 40)
    assert str(caught.value.narrowing) == PLACE


def test_the_criteria_of_the_paper_are_undecided():
    facts = expressivity_facts(features(), torch.randn(4, 1), narrow=PLACE)
    assert [each.verdict for each in judge_expressivity(facts)] == ["undecided", "undecided"]
    assert not facts.log_phi.certified
    assert [each.verdict for each in judge_expressivity(expressivity_facts(features(), narrow=""))] == ["certified"]
