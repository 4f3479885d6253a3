"""What reading a sample changes is noticed and put back; what it leaves alone is not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_conv.callbacks.run.data.put_back import put_back

X = torch.arange(20.0).reshape(10, 2)
READS = 0
SEEN = []


class Plain(Dataset):
    def __init__(self):
        self.count, self.log, self.cache, self.seen = 0, [], {}, set()
        self.numbers, self.tensor, self.counter = np.zeros(10), torch.zeros(10), Counter()

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index]


class Counts(Plain):
    def __getitem__(self, index):
        self.count += 1
        return X[index]


class CountsInItsClass(Plain):
    reads = 0

    def __getitem__(self, index):
        CountsInItsClass.reads += 1
        return X[index]


class CountsGlobally(Plain):
    def __getitem__(self, index):
        global READS
        READS += 1
        return X[index]


class ListsGlobally(Plain):
    def __getitem__(self, index):
        SEEN.append(index)
        return X[index]


class Logs(Plain):
    def __getitem__(self, index):
        self.log.append(index)
        return X[index]


class Caches(Plain):
    def __getitem__(self, index):
        return self.cache.setdefault(index, X[index] * 1)


class Notes(Plain):
    def __getitem__(self, index):
        self.seen.add(index)
        return X[index]


class CountsInAnArray(Plain):
    def __getitem__(self, index):
        self.numbers[index] += 1
        return X[index]


class CountsInATensor(Plain):
    def __getitem__(self, index):
        self.tensor[index] += 1
        return X[index]


class Tallies(Plain):
    def __getitem__(self, index):
        self.counter[index] += 1
        return X[index]


class Replaces(Plain):
    def __getitem__(self, index):
        self.tensor = torch.ones(3)
        return X[index]


class CallsAClosure(Plain):
    def __init__(self):
        super().__init__()
        reads = 0

        def transform(x):
            nonlocal reads
            reads += 1
            return x

        self.transform, self.reads = transform, lambda: reads

    def __getitem__(self, index):
        return self.transform(X[index])


def traces(data):
    plain = {name: each for name, each in vars(data).items() if not callable(each)}
    called = data.reads() if callable(getattr(data, "reads", None)) else None
    return (
        repr(plain), READS, list(SEEN), CountsInItsClass.reads, called,
    )  # fmt: skip


CHANGING = [
    Counts, CountsInItsClass, CountsGlobally, ListsGlobally, Logs, Caches, Notes, CountsInAnArray, CountsInATensor,
    Tallies, Replaces, CallsAClosure,
]  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", CHANGING)
def test_what_reading_changes_is_noticed_and_put_back(kind, wrapped):
    data = kind()
    reader = Subset(data, range(10)) if wrapped else data
    reader[3]  # some change only once what is changed then
    before = traces(data)
    if kind is Replaces:
        data.tensor = torch.zeros(10)
        before = traces(data)
    with put_back(reader, torch.utils.data.default_collate) as changes:
        reader[4]
        reader[5]
        assert traces(data) != before
    assert changes.what
    assert traces(data) == before


@pytest.mark.parametrize("data", [Plain(), TensorDataset(X), Subset(TensorDataset(X), [1, 3]), list(X)])
def test_what_changes_nothing_is_left_alone(data):
    with put_back(data, torch.utils.data.default_collate) as changes:
        torch.utils.data.default_collate([data[0], data[1]])
    assert not changes.what


def test_an_error_passes_through_and_what_was_changed_is_put_back():
    data = Counts()

    def read():
        with put_back(data):
            data[99]

    with pytest.raises(IndexError):
        read()
    assert data.count == 0


def test_long_containers_are_noticed_but_not_copied():
    data = Logs()
    data.log = list(range(1000))
    with put_back(data) as changes:
        data[3]
    assert changes.what == "a list"
    assert len(data.log) == 1001
