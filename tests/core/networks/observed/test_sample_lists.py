"""Lists of samples of several shapes become tensors with one row per sample, and come back as they were."""

from __future__ import annotations

import pytest
import torch

from lightning_conv.networks.observed.leaves import tensors_in
from lightning_conv.networks.observed.sample_lists import (
    as_list,
    as_rows,
    chosen,
    lists_of_samples,
    ragged_count,
    same_rest,
)

SEQUENCES = [torch.randn(length, 3) for length in (2, 4, 1, 3)]


def equal(one, other):
    these, those = list(tensors_in(one)), list(tensors_in(other))
    return [place for place, _ in these] == [place for place, _ in those] and all(
        torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(these, those, strict=True)
    )


@pytest.mark.parametrize(
    "entries",
    [
        SEQUENCES,
        tuple(SEQUENCES),
        [torch.arange(length) for length in (3, 0, 2)],
        [torch.randn(3, h, w) for h, w in ((2, 5), (4, 1))],
        [torch.tensor(2), torch.tensor(7)],
        ["one text", "another"],
        (1, 2, 5),
        [{"image": torch.randn(1, n, n), "boxes": torch.randn(n, 4), "kind": "cat"} for n in (1, 3, 2)],
        [(each, torch.tensor(1.0)) for each in SEQUENCES],
    ],
)
def test_a_list_comes_back_as_it_was(entries):
    rows = as_rows(entries, "x")
    assert {len(each) for each in rows.values()} == {len(entries)}
    assert equal(as_list(entries, "x", rows), entries)
    assert type(as_list(entries, "x", rows)) is type(entries)
    some = {name: each[[1, 0]] for name, each in rows.items()}
    assert same_rest(rows, some)
    assert equal(as_list(entries, "x", some), type(entries)([entries[1], entries[0]]))


def test_lists_of_samples_are_found_in_a_batch():
    batch = {"x": SEQUENCES, "y": torch.zeros(4), "more": (SEQUENCES[0], [{"z": each} for each in SEQUENCES])}
    assert lists_of_samples(batch, 4) == (("x",), ("more", 1))
    assert ragged_count(batch) == 4
    few = chosen(batch, [("x",), ("more", 1)], [2, 0, 1])
    assert few["x"][0] is SEQUENCES[2]
    assert [len(few["x"]), len(few["more"][1]), len(batch["x"])] == [3, 3, 4]


@pytest.mark.parametrize(
    "batch",
    [
        [torch.zeros(4, 3), torch.zeros(4)],  # inputs and targets
        [torch.zeros(4, 3), torch.zeros(5, 3)],  # two entries tell nothing
        [torch.zeros(4, 3), torch.zeros(4, 5), torch.zeros(4, 2)],  # of the same four samples
        [torch.zeros(4), torch.zeros(5, 1), torch.zeros(6)],  # of other numbers of axes
    ],
)
def test_tensors_side_by_side_are_no_samples(batch):
    assert ragged_count(batch) == 0


def test_what_else_is_in_a_sample_stays_with_it():
    entries = [{"x": torch.zeros(n), "name": str(n)} for n in (1, 2, 3)]
    assert lists_of_samples(entries, 3) == ((),)
    rows = {name: each[[2, 0]] for name, each in as_rows(entries, "batch").items()}
    assert [(len(each["x"]), each["name"]) for each in as_list(entries, "batch", rows)] == [(3, "3"), (1, "1")]


def test_other_texts_are_other_samples():
    one, other = (as_rows(texts, "t") for texts in (["a", "b", "c"], ["a", "b", "d"]))
    assert same_rest(one, {name: each[:2] for name, each in other.items()})
    assert not same_rest(one, other)
    assert not same_rest({name: each[:2] for name, each in one.items()}, one)
