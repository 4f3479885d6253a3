"""Certificates of features that are never held: against the dense ones, against exact eigenvalues, after a kill."""

import json
import math
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_conv import certify_expressivity
from lightning_conv.expressivity import HeldRows, closest_rows, plan_stream
from lightning_conv.expressivity.factor import lowest_eigenvalue, solve, tiled_cholesky
from lightning_conv.expressivity.stream import gram_rounding, stream_gram
from lightning_conv.expressivity.streamed import certify_streamed
from lightning_conv.expressivity.tiles import Tiles
from lightning_conv.progress import silent


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nothing(_):
    return None


def gram_tiles(features, tile, *, bias=True, panel=2, path=None):
    tiles = Tiles(len(features), tile, path)
    stream_gram(HeldRows(features), tiles, bias=bias, panel=panel, report=silent, save=nothing)
    return tiles


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
    found = tiles.dense()
    assert float((found - expected).abs().max()) <= 1e-13 * float(expected.abs().max())
    assert torch.equal(tiles.diagonal(), found.diagonal())
    assert gram_rounding(tiles, width) >= float(torch.linalg.matrix_norm(found - expected, 2)) / 2


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
        found = tiles.dense().tolist()
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
    exact = float(exact_eigenvalues(tiles.dense())[0])
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
    assert certificate.sigma_max.lower <= dense.sigma_max.value <= certificate.sigma_max.upper
    assert certificate.sigma_max.lower > 0.5 * dense.sigma_max.value


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
    features[21] = (features[4] + features[5]) / 2
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


SCRIPT = """
import sys, time, torch
from lightning_conv.expressivity import HeldRows
from lightning_conv.expressivity.streamed import certify_streamed

class Slow(HeldRows):
    def rows(self, start, stop):
        time.sleep(float(sys.argv[2]))
        print("rows", start, flush=True)
        return super().rows(start, stop)

features = torch.randn(300, 330, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
found = certify_streamed(Slow(features), tile=20, folder=sys.argv[1], max_memory=250_000, progress=False)
print(found.verdict, found.sigma_min.lower.hex(), found.sigma_min.upper.hex())
"""


def run(folder, pause, lines=None):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(pause)], stdout=subprocess.PIPE, text=True
    )
    if lines is not None:
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    out = process.communicate()[0]
    return process.returncode, out.splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    _, whole = run(tmp_path / "whole", 0)
    code, _ = run(tmp_path / "killed", 0.01, lines=32)
    assert code == -signal.SIGKILL
    noted = json.loads((tmp_path / "killed" / "progress.json").read_text())["stages"]
    assert 0 < noted["gram"][0] < 15
    code, rest = run(tmp_path / "killed", 0)
    assert code == 0
    assert rest[-1] == whole[-1]
    assert len(rest) < len(whole)
