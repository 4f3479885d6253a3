"""A certificate whose tiles are divided among processes is that of one process, to the last bit, and its errors are those of all."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from on_ranks import run

from lightning_conv import certify_expressivity
from lightning_conv.expressivity.plan import plan_stream
from lightning_conv.expressivity.shared import SharedCholesky, owner, rows_of
from lightning_conv.expressivity.stream import HeldRows
from lightning_conv.expressivity.streamed import certify_streamed
from lightning_conv.machine.processes import Processes


def rand(samples, width, seed=0):
    return torch.randn(samples, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def twins():
    features = rand(40, 60)
    features[31] = features[3]
    return features


CASES = {
    "certified": (lambda: rand(70, 90), {"tile": 8}),
    "tiles of other sizes": (lambda: rand(45, 50), {"tile": 7, "bias": False}),
    "panels": (lambda: rand(60, 3000), {"tile": 10, "max_memory": 1_000_000}),
    "one tile": (lambda: rand(9, 30), {"tile": 16}),
    "large": (lambda: rand(40, 60) * 2.0**300, {"tile": 9}),
    "two are equal": (twins, {"tile": 6}),
    "no factor": (lambda: torch.ones(30, 40, dtype=torch.float64) + 1e-9 * rand(30, 40), {"tile": 5}),
    "rounding inside the trunk": (lambda: rand(40, 60), {"tile": 9, "feature_error": 1e-9}),
}


def certificates(processes, folder=None):
    """Return each case's certificate, without what it took."""
    torch.set_num_threads(1)
    found = {}
    for name, (make, options) in CASES.items():
        place = None if folder is None else folder / name.replace(" ", "_")
        made = certify_streamed(HeldRows(make()), **options, folder=place, processes=processes)
        found[name] = replace(made, cost=None)
    for name, features in (("held", rand(600, 700)), ("few", rand(30, 40))):
        found[name] = replace(certify_expressivity(features, processes=processes), cost=None)
    entering = rand(30, 8)
    distinct = certify_expressivity(rand(30, 40), method="distinct", entering=entering, processes=processes)
    found["distinct"] = replace(distinct, cost=None)
    return found


def divided(rank, world):
    processes = Processes(60)
    found = certificates(processes)
    return found, processes.sent


@pytest.mark.parametrize("world", [2, 3])
def test_it_is_that_of_one_process(world, tmp_path):
    expected = certificates(None)
    verdicts = {name: each.verdict for name, each in expected.items()}
    assert verdicts["certified"] == verdicts["panels"] == verdicts["large"] == verdicts["held"] == "certified"
    assert verdicts["two are equal"] == "refuted"
    assert verdicts["no factor"] == "undecided"
    assert plan_stream(60, 3000, tile=10, max_memory=1_000_000).panel < 6
    for found, sent in run(world, divided, tmp_path):
        assert found == expected
        assert sent > 0


def interrupted(folder, rank, world):
    """Fail after three columns of the first factor in the first process, and go on with what is in the folder."""
    processes = Processes(60)
    own = folder if rank == 0 else None
    run_all = SharedCholesky.run
    with pytest.MonkeyPatch.context() as patch:

        def run_some(self, *, done, report, save):
            def fails(columns):
                save(columns)
                if columns == 3:
                    raise OSError("the disk is full")

            return run_all(self, done=done, report=report, save=fails)

        if rank == 0:
            patch.setattr(SharedCholesky, "run", run_some)
        with pytest.raises(OSError, match="the disk is full"):
            certify_streamed(HeldRows(rand(70, 90)), tile=8, folder=own, processes=processes)
    noted = json.loads((folder / "progress.json").read_text())["stages"] if rank == 0 else None
    again = certify_streamed(HeldRows(rand(70, 90)), tile=8, folder=own, processes=processes)
    return noted, replace(again, cost=None)


def test_it_goes_on_after_an_error_in_the_first_process(tmp_path):
    (folder := tmp_path / "work").mkdir()
    (noted, first), (_, second) = run(2, partial(interrupted, folder), tmp_path)
    assert noted["first"]["columns"] == 3
    assert first == second == replace(certify_streamed(HeldRows(rand(70, 90)), tile=8), cost=None)


def one_fails(rank, world):
    processes = Processes(60)
    said = []
    for place in ("shared.is_factored", "shared.divide_by", "stream._product"):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(f"lightning_conv.expressivity.{place}", lambda *_: "no" + 1)
            with pytest.raises(TypeError) as error:
                certify_streamed(HeldRows(rand(70, 90)), tile=8, processes=processes)
        said.append(str(error.value))
    return said, certify_streamed(HeldRows(rand(30, 40)), tile=8, processes=processes).verdict


def test_an_error_in_another_one_is_that_of_all(tmp_path):
    (first, verdict), (second, _) = run(2, one_fails, tmp_path)
    assert verdict == "certified"
    assert first == second
    assert all(each.startswith("process 1: can only concatenate") for each in first)


@pytest.mark.parametrize(("count", "world"), [(8, 2), (20, 4), (3, 5)])
def test_each_tile_row_has_one_owner_and_work_is_even(count, world):
    rows = [rows_of(rank, world, count) for rank in range(world)]
    assert sorted(i for own in rows for i in own) == list(range(count))
    assert all(owner(i, world) == rank for rank, own in enumerate(rows) for i in own)
    work = [sum(i**2 for i in own) for own in rows]
    if count > world:
        assert max(work) <= 1.3 * sum(work) / world
