"""Every generator that a data set, a transform or a collate function holds is found, and put back after reading."""

from __future__ import annotations

import functools
import random
import types
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_conv.callbacks.run.data.data_generators import generators_of, unmoved, unread

KINDS = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: float(torch.rand((), generator=g))),
    "python": (lambda: random.Random(1), lambda g: g.random()),
    "numpy": (lambda: np.random.default_rng(1), lambda g: float(g.random())),
    "numpy, old": (lambda: np.random.RandomState(1), lambda g: float(g.rand())),
    "numpy, bits": (lambda: np.random.PCG64(1), lambda g: int(g.random_raw())),
    "numpy, other bits": (lambda: np.random.Generator(np.random.MT19937(1)), lambda g: float(g.random())),
}


class Holder(Dataset):
    def __init__(self, **held):
        vars(self).update(held)

    def __len__(self):
        return 4


class Slots:
    __slots__ = ("generator",)

    def __init__(self, generator):
        self.generator = generator


@dataclass
class Transform:
    options: dict = field(default_factory=dict)

    def __call__(self, x):
        return x

    def apply(self, x):
        return x


def closing_over(generator):
    def collate(samples):
        return generator, samples

    return collate


def with_default(generator):
    def collate(samples, generator=generator):
        return samples

    return collate


def with_keyword_default(generator):
    def collate(samples, *, generator=generator):
        return samples

    return collate


def with_attribute(generator):
    def collate(samples):
        return samples

    collate.rng = generator
    return collate


class Noise(nn.Module):
    """A transform as those of torchvision are."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator


PLACES = {
    "itself": lambda g: g,
    "an attribute": lambda g: Holder(rng=g),
    "a slot": Slots,
    "a dict": lambda g: Holder(more={"rng": g}),
    "an ordered dict": lambda g: Holder(more=OrderedDict(rng=g)),
    "a list": lambda g: Holder(more=[1, g]),
    "a tuple": lambda g: Holder(more=(1, g)),
    "a deque": lambda g: Holder(more=deque([g])),
    "a nested container": lambda g: Holder(more={"a": [({"b": g},)]}),
    "a transform": lambda g: Holder(transform=Transform({"rng": g})),
    "a bound method": lambda g: Transform({"rng": g}).apply,
    "a closure": closing_over,
    "a default": with_default,
    "a keyword's default": with_keyword_default,
    "a lambda in an attribute": lambda g: Holder(transform=lambda x: x + g),
    "a partial function": lambda g: functools.partial(sorted, key=g),
    "a partial of a function": lambda g: functools.partial(closing_over(g), 1),
    "a wrapped function": lambda g: functools.wraps(len)(closing_over(g)),
    "a function's attribute": with_attribute,
    "a module": lambda g: nn.Sequential(nn.Identity(), Noise(g)),
    "a module in a transform": lambda g: Holder(transform=Transform({"all": [nn.Sequential(Noise(g))]})),
    "a subset": lambda g: Subset(Holder(rng=g), [0, 1]),
    "a concatenation": lambda g: ConcatDataset([TensorDataset(torch.zeros(2)), Holder(rng=g)]),
    "a subset of a concatenation": lambda g: Subset(ConcatDataset([Holder(rng=g)]), [0]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_and_put_back(place, kind):
    make, draw = KINDS[kind]
    generator, expected = make(), draw(make())
    holder = PLACES[place](generator)
    assert [each is generator for each in generators_of(holder)] == [True]
    with unmoved(holder):
        first, second = draw(generator), draw(generator)
        assert first == expected
        assert second != first  # inside it moves on
    assert draw(generator) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_put_back_after_an_error(kind):
    make, draw = KINDS[kind]
    generator, expected = make(), draw(make())

    def read():
        with unread(Holder(rng=generator)):
            draw(generator)
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        read()
    assert draw(generator) == expected


OF_THE_MODULE = random.Random(5)


class DrawsFromItsModule(Dataset):
    def __init__(self):
        self.x = [1.0]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.x[index] + OF_THE_MODULE.random()


def collate_from_its_module(samples):
    return [each + OF_THE_MODULE.random() for each in samples]


class Inherits(DrawsFromItsModule):
    """Its code is that of its base."""


class Indirectly(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return collate_from_its_module([1.0])

    @staticmethod
    def collate(samples):
        return collate_from_its_module(samples)


READERS = [
    DrawsFromItsModule(), collate_from_its_module, Subset(DrawsFromItsModule(), [0]), Inherits(), Indirectly(), Indirectly.collate,
    functools.partial(collate_from_its_module),
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_a_generator_of_the_module_is_found_through_the_code_that_names_it(reader):
    assert any(each is OF_THE_MODULE for each in generators_of(reader))
    before = OF_THE_MODULE.getstate()
    with unmoved(reader):
        OF_THE_MODULE.random()
    assert OF_THE_MODULE.getstate() == before


def test_a_generator_of_another_module_is_found(monkeypatch):
    other = types.ModuleType("augmentations")
    other.rng = random.Random(1)
    monkeypatch.setitem(globals(), "augmentations", other)

    def collate(samples):
        return [augmentations.rng.random() for _ in samples]  # noqa: F821

    assert generators_of(collate) == [other.rng]


class KeepsItOnTheClass(Dataset):
    rng = np.random.default_rng(3)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.rng.random()


def test_a_generator_of_the_class_is_found():
    reader = KeepsItOnTheClass()
    assert any(each is KeepsItOnTheClass.rng for each in generators_of(reader))


def test_the_generators_of_the_process_are_put_back_too():
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = float(torch.rand(())), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    with unread():
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert (float(torch.rand(())), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_one_that_is_held_twice_or_in_a_circle_is_found_once():
    generator = random.Random(1)
    holder = Holder(a=generator, b=[generator])
    holder.itself = holder
    assert generators_of(holder) == [generator]


def test_tensors_and_long_lists_of_samples_are_not_walked_through():
    class Counted(list):
        looked = 0

        def __iter__(self):
            for each in super().__iter__():
                Counted.looked += 1
                yield each

    generator = random.Random(1)
    holder = Holder(x=torch.zeros(10), samples=Counted([float(i) for i in range(1000)]), rng=generator)
    assert generators_of(holder) == [generator]
    assert Counted.looked <= 1000
