"""A trunk that casts to a narrower type is not certified, by any method, at any size, on any rank, and the place is named."""

from __future__ import annotations

import pytest
import torch
from casting import FORWARD, OUTSIDE, Layer, RMSNorm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_conv.callbacks.guard.certify.certificate as room
from lightning_conv.callbacks import ConvergenceCriteria, ExpressivityGuard
from lightning_conv.expressivity import certify


@pytest.fixture
def guarded(make_trainer, make_regression):
    """Train a trunk on 30 samples with a guard that switches after one epoch."""

    def run(trunk, width=40, inputs=3, batch_size=30, callbacks=(), scale=1.0, precision="32-true", **options):
        torch.manual_seed(0)
        x, y = scale * torch.rand(30, inputs), torch.randn(30, 1)
        if precision == "64-true":
            x, y = x.double(), y.double()
        module = make_regression(nn.Sequential(trunk, nn.Linear(width, 1)), 1e-3)
        guard = ExpressivityGuard(switch_at=1, **options)
        data = DataLoader(TensorDataset(x, y), batch_size=batch_size)
        make_trainer([guard, *callbacks], max_epochs=3, precision=precision).fit(module, data)
        return guard

    return run


def affine(layer, width=40):
    return nn.Sequential(nn.Linear(3, width), layer)


def wide(layer=None, width=40):
    layers = [] if layer is None else [layer]
    return nn.Sequential(nn.Linear(3, 12), *layers, nn.Tanh(), nn.Linear(12, width), nn.Softplus(100, 40.0))


def test_a_trunk_of_rank_5_with_the_norm_of_llama_is_undecided_and_the_place_is_named(guarded):
    guard = guarded(affine(RMSNorm(40)))
    assert guard.verdict != "certified"
    assert guard.certificate.verdict == "undecided"
    assert guard.certificate.rank_lower <= 5
    assert "computes in torch.float32 (aten::_to_copy)" in guard.certificate.reason
    assert guard.certificate.narrow.startswith("'")
    assert guard.certificate.sigma_min.lower == 0


@pytest.mark.parametrize("name", [*FORWARD, *OUTSIDE])
def test_no_kind_of_cast_is_certified(guarded, name):
    function = {**FORWARD, **OUTSIDE}[name]
    guard = guarded(nn.Sequential(nn.Linear(3, 8), Layer(function), nn.Linear(8, 40), nn.Softplus(100, 40.0)))
    assert guard.verdict != "certified"
    assert guard.certificate.narrow
    assert guard.certificate.narrow in guard.certificate.reason


@pytest.mark.slow
def test_the_same_trunk_without_a_cast_is_certified(guarded):
    guard = guarded(wide(), precision="64-true")
    assert guard.certificate.verdict == "certified"
    assert guard.certificate.narrow == ""
    assert guard.certificate.rank_lower == 30


def test_a_cast_right_before_the_head_is_one_inside_the_trunk(guarded):
    class Cast(nn.Module):
        def forward(self, x):
            return x.float().to(x)

    assert guarded(nn.Sequential(wide(), Cast())).certificate.verdict == "undecided"


@pytest.mark.parametrize("where", ["below the wide layer", "behind it"])
def test_distinct_is_undecided_wherever_the_cast_is(guarded, where):
    behind = nn.Sequential(*wide(), Layer(FORWARD["float"]))
    guard = guarded(wide(Layer(FORWARD["float"])) if where == "below the wide layer" else behind, method="distinct")
    if guard.certificate is None:  # the theorem does not apply to such a layer
        assert where == "behind it"
        assert guard.verdict != "certified"
        return
    assert guard.certificate.method == "distinct"
    assert guard.certificate.verdict == "undecided"
    assert guard.certificate.narrow


@pytest.mark.slow
def test_distinct_without_a_cast_is_watched_and_certified(guarded):
    certificate = guarded(wide(), method="distinct", precision="64-true").certificate
    assert (certificate.verdict, certificate.narrow) == ("certified", "")


@pytest.mark.slow
@pytest.mark.parametrize("width", [10, 40])
def test_alignment_is_undecided(guarded, width):
    guard = guarded(wide(Layer(FORWARD["float"]), width), width=width, method="alignment")
    assert (guard.certificate.method, guard.certificate.verdict) == ("alignment", "undecided")
    assert guard.certificate.rank_lower == 0
    assert guard.verdict != "certified"


@pytest.fixture
def streaming(monkeypatch):
    """30 samples are many here, and four of them are enough for the allowance."""
    monkeypatch.setattr(room, "is_held", lambda *args, **kwargs: False)
    monkeypatch.setattr(certify, "is_held", lambda *args, **kwargs: False)
    monkeypatch.setattr(room, "SAMPLED", 4)


@pytest.mark.slow
def test_many_samples_are_undecided(guarded, streaming):
    guard = guarded(wide(RMSNorm(12)), method="singular")
    assert guard.certificate.verdict == "undecided"
    assert guard.certificate.narrow
    assert guarded(wide(), method="singular").certificate.narrow == ""


def test_a_cast_that_only_later_samples_meet_is_seen_and_allowed_for(guarded, streaming, monkeypatch):
    class Sometimes(nn.Module):
        def forward(self, x):
            return x.float().to(x) if len(x) > 4 and x.dtype == torch.float64 else x

    certificate = guarded(wide(Sometimes()), method="singular").certificate
    assert certificate.verdict == "undecided"
    assert certificate.narrow.endswith("computes in torch.float32 (aten::_to_copy)")
    assert not certificate.sigma_min.certified
    assert certificate.feature_error > 1e-6  # that of float32


def test_the_certificate_survives_a_checkpoint(guarded):
    guard = guarded(affine(RMSNorm(40)))
    other = ExpressivityGuard(switch_at=1)
    other.load_state_dict(guard.state_dict())
    assert other.certificate == guard.certificate
    assert other.certificate.narrow == guard.certificate.narrow != ""


@pytest.mark.slow
def test_the_criteria_on_the_probe_are_undecided(guarded):
    def verdicts(trunk):
        criteria = ConvergenceCriteria(which=["kawaguchi_sun"], probe=30, every_n_steps=1)
        guarded(trunk, callbacks=[criteria])
        return {each.name: each for each in criteria.criteria}

    found = verdicts(affine(RMSNorm(40)))["expressivity_condition"]
    assert found.verdict == "undecided"
    assert "computes in torch.float32" in found.reason
    assert verdicts(wide())["expressivity_condition"].verdict in ("consistent", "certified")
