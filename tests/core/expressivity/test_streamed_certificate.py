"""Certificates of streamed features: against dense ones, against exact eigenvalues, and after a kill."""

import json
import math
import signal
import subprocess
import sys
import weakref
from types import SimpleNamespace

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_conv import certify_expressivity
from lightning_conv.expressivity import HeldRows, closest_rows, plan_stream
from lightning_conv.expressivity.certify import chosen
from lightning_conv.expressivity.factor import lowest_eigenvalue, solve, tiled_cholesky
from lightning_conv.expressivity.journal import Journal
from lightning_conv.expressivity.proof import Proof
from lightning_conv.expressivity.stream import gram_rounding, stream_gram
from lightning_conv.expressivity.streamed import certify_streamed
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.reporting.progress import progress_bar, silent


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nothing(_):
    return None


def gram_tiles(features, tile, *, bias=True, panel=2, path=None):
    tiles = Tiles(len(features), tile, path)
    stream_gram(HeldRows(features), tiles, bias=bias, panel=panel, report=silent, save=nothing)
    return tiles


def dense(tiles):
    return tiles.times(torch.eye(tiles.size, dtype=torch.float64))


def tiles_of(matrix, tile):
    tiles = Tiles(len(matrix), tile)
    for k in range(tiles.count):
        for i, block in tiles.column(k):
            block.copy_(matrix[tiles.rows(i), tiles.rows(k)])
    return tiles


@given(
    n=st.integers(1, 40), width=st.integers(1, 50), tile=st.integers(1, 45), panel=st.integers(1, 6), bias=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_the_streamed_gram_is_the_gram(n, width, tile, panel, bias):
    features = rand(n, width, seed=n)
    tiles = gram_tiles(features, tile, bias=bias, panel=panel)
    expected = features @ features.T + (1 if bias else 0)
    found = dense(tiles)
    assert float((found - expected).abs().max()) <= 1e-13 * float(expected.abs().max())
    assert torch.equal(tiles.diagonal(), found.diagonal())
    assert gram_rounding(tiles, width) >= float(torch.linalg.matrix_norm(found - expected, 2)) / 2


@pytest.mark.parametrize("panel", [1, 2, 3])
def test_no_more_strips_of_features_are_alive_than_the_plan_counts(panel):
    alive = []

    def rows(start, stop):
        strip = rand(stop - start, 30, seed=start)
        alive.append(weakref.ref(strip))
        assert sum(each() is not None for each in alive) <= panel + 1
        return strip

    tiles = Tiles(50, 7)
    source = SimpleNamespace(samples=50, width=30, rows=rows)
    stream_gram(source, tiles, bias=True, panel=panel, report=silent, save=nothing)
    assert len(alive) > tiles.count  # several panels


def test_the_rounding_of_the_gram_is_within_its_bound(monkeypatch):
    import mpmath

    monkeypatch.setattr("lightning_conv.expressivity.stream.STRIP", 16)
    features = (
        rand(6, 100) * 10.0 ** torch.randint(-6, 7, (6, 100), generator=torch.Generator().manual_seed(1)).double()
    )
    tiles = gram_tiles(features, 4, bias=True)
    with mpmath.workdps(60):
        h = mpmath.matrix(features.tolist())
        exact = h * h.T + mpmath.ones(6)
        found = dense(tiles).tolist()
        norm = math.sqrt(sum(float(exact[i, j] - mpmath.mpf(found[i][j])) ** 2 for i in range(6) for j in range(6)))
    assert 0 < norm <= gram_rounding(tiles, 100)


@given(n=st.integers(1, 40), tile=st.integers(1, 45), columns=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_factor_solves_and_multiplies_back(n, tile, columns):
    matrix = rand(n, n + 5, seed=n)
    matrix = matrix @ matrix.T + torch.eye(n)
    tiles, factor = tiles_of(matrix, tile), Tiles(n, tile)
    shares = []
    assert tiled_cholesky(tiles, factor, 0.5, report=shares.append, save=nothing) == n
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    shifted = matrix - 0.5 * torch.eye(n)
    right = rand(n, columns)
    torch.testing.assert_close(solve(factor, right), torch.linalg.solve(shifted, right), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tiles.times(right), matrix @ right)


@pytest.mark.parametrize("smallest", [1e-3, 1e-8, 1e-12])
def test_a_factor_proves_less_than_lambda_min(smallest, exact_eigenvalues):
    n, tile = 24, 7
    basis = torch.linalg.qr(rand(n, n)).Q
    matrix = (basis * torch.logspace(math.log10(smallest), 0, n, dtype=torch.float64)) @ basis.T
    tiles, factor = tiles_of(matrix, tile), Tiles(n, tile)
    exact = float(exact_eigenvalues(dense(tiles))[0])
    for share in (0.0, 0.5, 0.9, 0.999, 1.001, 1.5):
        rows = tiled_cholesky(tiles, factor, share * exact, report=silent, save=nothing)
        if rows == n:
            assert lowest_eigenvalue(tiles, share * exact) <= exact
        else:
            assert rows % tile == 0
        assert rows == n or share > 0.99


def test_a_matrix_that_is_not_definite_has_no_factor_and_says_how_far_it_got():
    matrix = torch.eye(20, dtype=torch.float64)
    matrix[13, 13] = -1
    assert tiled_cholesky(tiles_of(matrix, 4), Tiles(20, 4), 0.0, report=silent, save=nothing) == 12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [7, 16, 64])
def test_agrees_with_the_singular_values(bias, tile, exact_singular_values):
    features = rand(30, 40)
    certificate = certify_streamed(HeldRows(features), bias=bias, tile=tile)
    exact = exact_singular_values(torch.cat([features, torch.ones(30, 1)], 1) if bias else features)[29]
    assert certificate.verdict == "certified"
    assert certificate.rank_lower == certificate.n == 30
    assert certificate.sigma_min.certified
    assert certificate.sigma_min.lower <= exact <= certificate.sigma_min.upper
    assert certificate.sigma_min.lower >= 0.98 * exact
    assert certificate.sigma_min.upper <= 1.02 * exact
    dense = certify_expressivity(features, bias=bias)
    assert "SVD" in dense.sigma_min.method
    assert max(certificate.sigma_min.lower, dense.sigma_min.lower) <= min(
        certificate.sigma_min.upper, dense.sigma_min.upper
    )
    assert certificate.sigma_max.lower <= dense.sigma_max.value <= certificate.sigma_max.upper
    assert certificate.sigma_max.lower > 0.999 * dense.sigma_max.value
    # A spectrum without a leading value, where the bound is the Frobenius norm of the Gram matrix.
    gram = (features @ features.T + bias).norm()
    assert certificate.sigma_max.upper <= float(gram) ** 0.5 * (1 + 1e-9)


@pytest.mark.parametrize("sign", ["of one sign", "centred"])
@pytest.mark.parametrize("scale", [1.0, 1e-100, 1e100])
def test_sigma_max_of_layers_features_is_known_to_a_millionth_and_its_bounds_hold(sign, scale, exact_singular_values):
    x = rand(40, 12)
    hidden = torch.nn.functional.softplus(x @ rand(12, 60, seed=1) / 12**0.5, beta=100)
    features = scale * (hidden if sign == "of one sign" else torch.tanh(3 * x[:, :1] + 0.3 * hidden))
    found = certify_streamed(HeldRows(features), bias=False, tile=16).sigma_max
    exact = exact_singular_values(features)[0]
    assert found.certified
    assert found.lower <= exact <= found.upper
    assert found.upper - found.lower <= 1e-6 * float(exact)
    assert math.sqrt(float(features.square().sum())) > 1.001 * found.upper  # what the trace alone would say


@pytest.mark.slow
@settings(deadline=None)
@given(size=st.integers(1, 12), tile=st.integers(1, 5), seed=st.integers(0, 2**16), spread=st.integers(-12, 12))
def test_sigma_max_bounds_hold_for_any_features(size, tile, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, size + 2, generator=generator, dtype=torch.float64)
    features *= 2.0 ** (spread * torch.rand(size, 1, generator=generator, dtype=torch.float64))
    found = certify_streamed(HeldRows(features), bias=False, tile=tile).sigma_max
    with mpmath.workdps(40):
        exact = max(mpmath.svd_r(mpmath.matrix(features.tolist()), compute_uv=False))
        assert found.lower <= exact <= found.upper


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-5])
def test_sigma_min_is_known_to_a_percent_where_the_largest_is_far_above(smallest, exact_singular_values):
    left, right = torch.linalg.qr(rand(40, 40)).Q, torch.linalg.qr(rand(60, 40, seed=1)).Q
    spectrum = torch.logspace(0, math.log10(smallest), 40, dtype=torch.float64)
    features = (left * spectrum) @ right.T
    certificate = certify_streamed(HeldRows(features), bias=False, tile=16)
    exact = exact_singular_values(features)[39]
    assert certificate.sigma_min.lower <= exact <= certificate.sigma_min.upper
    assert certificate.sigma_min.lower >= 0.98 * exact
    assert certificate.sigma_min.upper <= 1.02 * exact


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_the_scale_does_not_matter(scale):
    features = rand(20, 30) * scale
    assert certify_streamed(HeldRows(features), bias=False, tile=6).verdict == "certified"


@pytest.mark.parametrize(("known", "verdict"), [(None, "undecided"), (False, "undecided"), (True, "refuted")])
def test_equal_rows_are_named_and_never_certified(known, verdict):
    features = rand(30, 40)
    features[21] = features[4]
    certificate = certify_streamed(HeldRows(features), tile=6)
    assert certificate.verdict == "refuted"
    assert "samples 4 and 21 have equal features" in certificate.reason
    assert certificate.rank_lower == 18  # three whole tiles come before sample 21
    assert certificate.sigma_min.lower == certificate.sigma_min.upper == 0
    asked = []
    same_inputs = None if known is None else lambda i, j: asked.append((i, j)) or known
    rounded = certify_streamed(HeldRows(features), tile=6, feature_error=1e-12, same_inputs=same_inputs)
    assert (rounded.verdict, rounded.rank_lower) == (verdict, 0)
    assert "samples 4 and 21" in rounded.reason
    assert asked == ([] if known is None else [(4, 21)])


def test_dependent_rows_that_differ_are_left_undecided_with_the_closest_two():
    features = rand(30, 40)
    features[21] = 0.6 * features[4] + 0.4 * features[5]  # not the midpoint, to which both are equally close
    certificate = certify_streamed(HeldRows(features), tile=6, bias=False)
    closest = closest_rows(features)
    assert certificate.verdict == "undecided"
    assert (
        f"samples {closest.first} and {closest.second}, at distance {closest.distance.value:.1e}" in certificate.reason
    )
    assert certificate.sigma_min.lower == 0 < certificate.sigma_min.upper
    assert certificate.sigma_min.upper == pytest.approx(closest.distance.value / 2**0.5)


def test_nearly_equal_rows_are_certified_as_far_as_squares_reach():
    verdicts = {}
    for distance in (1e-2, 1e-5, 1e-9):
        features = rand(30, 40)
        features[21] = features[4] + distance * rand(40, seed=3)
        verdicts[distance] = certify_streamed(HeldRows(features), tile=6).verdict
    assert verdicts == {1e-2: "certified", 1e-5: "certified", 1e-9: "undecided"}


def test_more_equal_pairs_than_are_looked_at_are_still_equal():
    features = rand(40, 50)
    features[20:] = features[:20]
    found = certify_streamed(HeldRows(features), tile=7)
    assert found.verdict == "refuted"


def test_rounding_inside_the_trunk_is_subtracted_and_takes_the_certificate_back():
    features = rand(30, 40)
    plain = certify_streamed(HeldRows(features), tile=8)
    small = certify_streamed(HeldRows(features), tile=8, feature_error=0.1 * plain.sigma_min.lower)
    assert small.verdict == "certified"
    assert not small.sigma_min.certified
    assert small.sigma_min.lower == pytest.approx(0.9 * plain.sigma_min.lower)
    large = certify_streamed(HeldRows(features), tile=8, feature_error=2 * plain.sigma_min.upper)
    assert (large.verdict, large.rank_lower) == ("undecided", 0)


def test_too_narrow_is_said_without_work():
    class Never:
        samples, width = 100, 20

        def rows(self, start, stop):
            raise AssertionError("not to be asked")

    certificate = certify_streamed(Never())
    assert certificate.verdict == "refuted"
    assert "too narrow" in certificate.reason


def test_bad_rows_are_named():
    class Wrong(HeldRows):
        def rows(self, start, stop):
            return super().rows(start, stop).float()

    with pytest.raises(ValueError, match=r"rows 0-1 are torch.float32"):
        certify_streamed(Wrong(rand(20, 30)))
    features = rand(20, 30)
    features[17, 3] = math.nan
    with pytest.raises(ValueError, match="sample 17"):
        certify_streamed(HeldRows(features), tile=6)


# --- the method ------------------------------------------------------------------------------------------------------


def test_the_public_call_tries_the_factors_first_and_then_all_singular_values():
    features = rand(520, 560)
    assert "Cholesky" in certify_expressivity(features).sigma_min.method
    features[519] = features[7] + 1e-9 * rand(560, seed=3)
    fallen_back = certify_expressivity(features)
    assert fallen_back.verdict == "certified"
    assert "SVD" in fallen_back.sigma_min.method


def test_rows_on_demand_and_held_rows_give_the_same_certificate():
    for n in (40, 520):
        features = rand(n, n + 30)
        held, rows = certify_expressivity(features), certify_expressivity(HeldRows(features))
        assert (held.verdict, held.sigma_min, held.sigma_max) == (rows.verdict, rows.sigma_min, rows.sigma_max)


@pytest.mark.parametrize(
    ("samples", "width", "entering", "targets", "method"),
    [
        (1000, 1100, True, True, "singular"),
        (20_001, 22_000, True, True, "distinct"),
        (20_001, 22_000, False, True, "singular"),
        (1000, 100, True, True, "alignment"),
        (1000, 100, True, False, "singular"),
    ],
)
def test_auto_chooses_by_size_and_by_what_is_given(samples, width, entering, targets, method):
    assert chosen(samples, width, True, entering, targets) == method


def test_the_prediction_is_shown_before_it_starts_and_told_with_the_result(monkeypatch):
    shown = []

    def bar(title, seconds, wanted):
        shown.append((title, seconds))
        return progress_bar(title, seconds, wanted)

    monkeypatch.setattr("lightning_conv.expressivity.streamed.progress_bar", bar)
    shares = []
    found = certify_expressivity(rand(600, 660), progress=shares.append)
    ((title, seconds),) = shown
    assert "600 x 661" in title
    assert f"about {seconds:.0f} s" in title
    assert found.cost.predicted == seconds > 0
    assert found.cost.seconds > 0
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_alignment_without_the_memory_for_it_is_refused_with_the_numbers():
    with pytest.raises(MemoryError, match=r"600 x 50 features takes .*; allow that"):
        certify_expressivity(rand(600, 50), targets=rand(600, 2), max_memory=100_000)


# --- memory and disk ------------------------------------------------------------------------------------------------


def test_the_plan_keeps_to_its_memory_and_says_when_it_cannot():
    plan = plan_stream(60_000, 66_000, max_memory=8 * 2**30)
    assert plan.on_disk
    assert plan.bytes <= 8 * 2**30
    assert plan.disk_bytes == pytest.approx(60_000**2 * 8, rel=0.05)  # two packed triangles
    assert "Gflop" in str(plan)
    held = plan_stream(5_000, 5_500, max_memory=4 * 2**30)
    assert not held.on_disk
    assert held.bytes <= 4 * 2**30
    with pytest.raises(MemoryError, match="allow"):
        plan_stream(60_000, 66_000, max_memory=2**30)


def test_max_memory_may_be_any_number_of_bytes_and_what_is_none_is_refused_by_every_method():
    for memory in (1e9, 2**30, 1.5 * 2**30):
        assert plan_stream(5_000, 5_500, max_memory=memory) == plan_stream(5_000, 5_500, max_memory=int(memory))
        assert certify_expressivity(rand(600, 660), max_memory=memory).verdict == "certified"
    for options in ({"method": "singular"}, {"method": "distinct", "entering": rand(6, 3)}, {"targets": rand(6, 2)}):
        with pytest.raises(ValueError, match=r"max_memory: 0\.5; give a positive number of bytes"):
            certify_expressivity(rand(6, 4), max_memory=0.5, **options)


def test_a_folder_holds_the_matrices_and_a_second_call_only_reads_them(tmp_path, monkeypatch):
    features = rand(40, 50)
    first = certify_streamed(HeldRows(features), tile=8, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gram.tiles", "factor.tiles", "progress.json"}
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    again = certify_streamed(HeldRows(features), tile=8, folder=tmp_path)
    assert (again.verdict, again.sigma_min) == (first.verdict, first.sigma_min)


def test_a_folder_of_other_features_is_begun_anew(tmp_path):
    certify_streamed(HeldRows(rand(40, 50)), tile=8, folder=tmp_path)
    other = rand(40, 50, seed=5)
    found = certify_streamed(HeldRows(other), tile=8, folder=tmp_path)
    assert found.sigma_min == certify_streamed(HeldRows(other), tile=8).sigma_min


def test_a_disk_without_room_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"folder: .* free, and .* are needed for gram.tiles"):
        certify_streamed(HeldRows(rand(40, 50)), tile=8, folder=tmp_path)


# --- after a kill ---------------------------------------------------------------------------------------------------


def test_one_changed_sample_begins_a_folder_anew(tmp_path):
    features = rand(40, 50)
    certify_streamed(HeldRows(features), tile=8, folder=tmp_path)
    features[17] = features[3]
    found = certify_streamed(HeldRows(features), tile=8, folder=tmp_path)
    assert found.verdict == "refuted"
    features[17, 5] += 1.0
    found = certify_streamed(HeldRows(features), tile=8, folder=tmp_path)
    assert found.sigma_min == certify_streamed(HeldRows(features), tile=8).sigma_min


SCRIPT = """
import json, os, signal, sys, torch
from pathlib import Path
from lightning_conv import certify_expressivity

folder, stage = sys.argv[1:]
asked = shares = 0

class Features:
    samples, width = 600, 660
    def rows(self, start, stop):
        global asked
        asked += 1
        generator = torch.Generator().manual_seed(0)
        return torch.randn(600, 660, dtype=torch.float64, generator=generator)[start:stop]

def kill(share):
    global shares
    shares += 1
    journal = Path(folder) / "progress.json"
    stages = json.loads(journal.read_text())["stages"] if journal.exists() else {}
    half = {"gram": stages.get("gram", [0])[0] >= 2, "first": stages.get("first", {}).get("columns", 0) >= 3,
            "second": stages.get("second", {}).get("columns", 0) >= 3}
    if half.get(stage):
        os.kill(os.getpid(), signal.SIGKILL)

# So little memory that the Gram matrix takes four panels of tile rows.
found = certify_expressivity(Features(), folder=folder, max_memory=1_500_000, progress=kill)
print(json.dumps([found.verdict, found.sigma_min.lower.hex(), found.sigma_min.upper.hex(), found.sigma_max.lower.hex(), asked, shares]))
"""


def run(folder, stage=""):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), stage], capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout) if done.returncode == 0 else None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_runs_killed_in_the_gram_and_in_both_factors_go_on_to_the_same_bits(tmp_path):
    code, (*whole, asked, shares) = run(tmp_path / "whole")
    assert code == 0
    assert whole[0] == "certified"
    stages = {}
    for stage in ("gram", "first", "second"):
        code, _ = run(tmp_path / "killed", stage)
        assert code == -signal.SIGKILL
        stages[stage] = json.loads((tmp_path / "killed" / "progress.json").read_text())["stages"]
    assert 2 <= stages["gram"]["gram"][0] < 8
    assert "first" not in stages["gram"]
    assert stages["first"]["gram"][0] == 8
    assert 3 <= stages["first"]["first"]["columns"] < 8
    assert stages["second"]["first"]["rows"] == 600
    assert 3 <= stages["second"]["second"]["columns"] < 8
    code, (*rest, asked_again, shares_again) = run(tmp_path / "killed")
    assert code == 0
    assert rest == whole
    assert asked_again < asked / 2  # each once, to check whether the folder belongs to them
    assert shares_again < shares / 4


def test_a_gram_begun_with_more_memory_goes_on_with_less():
    features = rand(60, 70)
    done = []
    tiles = Tiles(60, 8)

    def stop(where):
        done.append(where)
        if where[2] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_gram(HeldRows(features), tiles, bias=True, panel=5, report=silent, save=stop)
    for panel in (2, 5, 7):
        again = Tiles(60, 8)
        again._numbers.copy_(tiles._numbers)
        stream_gram(HeldRows(features), again, bias=True, panel=panel, done=done[-1], report=silent, save=nothing)
        assert torch.equal(dense(again), dense(gram_tiles(features, 8)))


def test_features_on_another_device_are_multiplied_where_the_tiles_are(elsewhere):
    features = rand(520, 540)
    with pytest.raises(RuntimeError, match="same device"):
        elsewhere(features) @ features.T
    here, there = certify_expressivity(features), certify_expressivity(elsewhere(features))
    assert there.verdict == "certified"
    assert there.sigma_min == here.sigma_min


def test_the_rayleigh_quotient_is_within_its_rounding_and_the_bound_counts_every_operation():
    """Compare with exact fractions, also where the quotient is as large as the trace."""
    from fractions import Fraction

    n = 60
    features = rand(n, 1) + 2
    tiles = gram_tiles(features, 16, bias=False)
    proof = Proof(tiles, tiles, 1, 0.0, Journal(None, {}), silent)
    vector, trace = features / features.norm(), float(tiles.diagonal().sum())
    value, slack = proof._rayleigh(vector, trace, 0.0)
    x = [Fraction(each) for each in (vector / vector.norm()).flatten().tolist()]
    rows = [[Fraction(each) for each in row] for row in dense(tiles).tolist()]
    exact = sum(a * sum(b * c for b, c in zip(row, x, strict=True)) for a, row in zip(x, rows, strict=True))
    assert abs(value - exact / sum(each * each for each in x)) <= slack
    u = 2.0**-53
    by_hand = (2 * n + 1) * u * float(dense(tiles).norm()) + (n + 1) * u * value
    assert by_hand <= slack <= 2 * by_hand
