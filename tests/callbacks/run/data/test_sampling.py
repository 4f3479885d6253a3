"""`describe_sampling`: one answer to the question whether a step sees every sample once, however the loader is made."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_conv.callbacks import ConvergenceCriteria, ExpressivityGuard
from lightning_conv.callbacks.run.data.sampling import Sampling, describe_sampling, register_sampler

N = 20
TABLE = TensorDataset(torch.rand(N, 4, generator=torch.Generator().manual_seed(0)), torch.rand(N, 1))


class OneByOne(SequentialSampler):
    """A subclass may do anything."""


class Own:
    """Batches of the run's own making; iterating it is noticed."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.rounds = batch_size, 0

    def __len__(self) -> int:
        return N // self.batch_size

    def __iter__(self):
        self.rounds += 1
        yield from (list(range(k, k + self.batch_size)) for k in range(0, N, self.batch_size))


class Unsized:
    """A sampler without a length."""

    def __iter__(self):
        yield from range(N)


def batches(sampler, size=N, drop_last=False):
    return DataLoader(TABLE, batch_sampler=BatchSampler(sampler, size, drop_last))


@pytest.fixture
def sampling(make_trainer, make_regression):
    """The sampling of a run that is about to train on a loader."""

    def of(loader, callbacks=(), **options):
        found = []

        class Asked(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                found.append(describe_sampling(trainer))

        trainer = make_trainer([Asked(), *callbacks], max_steps=1, **options)
        trainer.fit(make_regression(nn.Linear(4, 1), 0.1), loader)
        return found[0]

    return of


WHOLE = {
    "batch_size": lambda: DataLoader(TABLE, batch_size=N),
    "more than there are": lambda: DataLoader(TABLE, batch_size=64),
    "shuffled": lambda: DataLoader(TABLE, batch_size=N, shuffle=True, drop_last=True),
    "a batch sampler": lambda: batches(SequentialSampler(TABLE)),
    "a random batch sampler": lambda: batches(RandomSampler(TABLE)),
    "a subset": lambda: DataLoader(TABLE, batch_size=10, sampler=SubsetRandomSampler(range(0, N, 2))),
}

PARTIAL = {
    "mini-batches": (lambda: DataLoader(TABLE, batch_size=8), "mini-batches: 8 of 20 samples per step"),
    "a batch sampler": (lambda: batches(RandomSampler(TABLE), 8), "mini-batches: 8 of 20 samples per step"),
    "replacement": (
        lambda: DataLoader(TABLE, batch_size=N, sampler=RandomSampler(TABLE, replacement=True)),
        "RandomSampler draws with replacement",
    ),
    "weights": (
        lambda: batches(WeightedRandomSampler(torch.ones(N), N)),
        "WeightedRandomSampler may weight samples",
    ),
    "a subclass": (lambda: batches(OneByOne(TABLE)), "OneByOne may weight samples"),
    "no length": (lambda: batches(Unsized()), "Unsized may weight samples"),
    "some only": (
        lambda: DataLoader(TABLE, batch_size=N, sampler=SequentialSampler(range(15))),
        "the sampler draws 15 samples per epoch, of a training set of 20",
    ),
    "twice": (
        lambda: DataLoader(TABLE, batch_size=N, sampler=RandomSampler(TABLE, num_samples=2 * N)),
        "the sampler draws 40 samples per epoch, of a training set of 20",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_one_batch_of_all_samples_is_whole_however_it_is_made(sampling, name):
    found = sampling(WHOLE[name]())
    assert found.whole
    assert (found.not_whole, found.caveats) == ("", ())
    assert found.smallest_batch == found.largest_batch == found.size


@pytest.mark.parametrize("name", PARTIAL)
def test_what_is_not_whole_says_why(sampling, name):
    make, said = PARTIAL[name]
    found = sampling(make())
    assert not found.whole
    assert said in found.not_whole


def test_a_declared_sampler_is_believed_and_its_subclass_is_not(sampling):
    @register_sampler
    class Declared(SequentialSampler):
        """A sampler whose author says that it draws every sample once."""

    class Further(Declared):
        """A subclass, of which nobody has said anything."""

    assert sampling(batches(Declared(TABLE))).whole
    assert "Further may weight samples" in sampling(batches(Further(TABLE))).not_whole


def test_batches_of_an_unknown_class_are_not_known_and_are_not_iterated(sampling):
    own = Own(N)
    found = sampling(DataLoader(TABLE, batch_sampler=own))
    assert "Own makes the batches itself" in found.not_whole
    assert (found.batch_size, found.largest_batch, found.smallest_batch) == (N, None, 1)
    assert own.rounds == 1  # by the run itself


def test_equal_batches_that_are_accumulated_make_a_whole_step(sampling):
    assert sampling(DataLoader(TABLE, batch_size=10), accumulate_grad_batches=2).whole
    assert "mini-batches: 16 of 20" in sampling(DataLoader(TABLE, 8), accumulate_grad_batches=2).not_whole
    # 8 + 8 + 4: the mean over the batches is not the mean over the samples.
    assert "do not fill 3 batches of 8" in sampling(DataLoader(TABLE, 8), accumulate_grad_batches=3).not_whole


def test_batches_that_are_never_trained_on_and_data_that_are_loaded_anew_are_caveats(sampling):
    limited = sampling(DataLoader(TABLE, batch_size=8), limit_train_batches=2)
    assert limited.caveats == ("only 2 of 3 batches are trained on in an epoch",)
    anew = sampling(DataLoader(TABLE, batch_size=N), reload_dataloaders_every_n_epochs=1)
    assert "loaded anew" in anew.not_whole
    left = sampling(DataLoader(TABLE, batch_size=8, drop_last=True))
    assert left.caveats == ("drop_last leaves out the same 4 samples in every epoch",)


def test_a_schedule_of_accumulation_makes_no_step_the_same_as_the_next(sampling):
    found = sampling(DataLoader(TABLE, batch_size=N), [GradientAccumulationScheduler({4: 2})])
    assert "GradientAccumulationScheduler" in found.not_whole


def test_data_without_random_access_are_refused(sampling):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from TABLE

    with pytest.raises(MisconfigurationException, match="random access"):
        sampling(DataLoader(Stream(), batch_size=N))


@pytest.mark.parametrize("name", ["batch_size", "a batch sampler"])
def test_guard_and_criteria_give_the_same_answer(make_trainer, make_regression, name):
    network = nn.Sequential(nn.Linear(4, 40), nn.Softplus(10), nn.Linear(40, 1))
    guard = ExpressivityGuard(switch_at=3)
    criteria = ConvergenceCriteria(which=["du", "kawaguchi_sun"], probe=N, every_n_steps=1)
    make_trainer([guard, criteria], max_epochs=6).fit(make_regression(network, 1e-3), WHOLE[name]())
    assert guard.descent.not_covered == ""
    assert [each for each in criteria.breaches if each.hypothesis == "full batch"] == []


def test_two_processes_share_a_step_and_a_sample_that_is_drawn_twice_is_seen():
    shared = Sampling(
        size=N, world=2, batch_size=10, drawn=10, drop_last=False, accumulated=1, uneven="", repeats=False, caveats=()
    )
    assert shared.whole
    assert (shared.largest_batch, shared.smallest_batch) == (10, N)
    padded = replace(shared, size=N - 1)  # a DistributedSampler repeats a sample where they cannot be divided evenly
    assert padded.not_whole == "the sampler draws 20 samples per epoch, of a training set of 19"
    assert padded.smallest_batch == 10
    assert replace(shared, batch_size=5).not_whole == "mini-batches: 10 of 20 samples per step"
    assert replace(shared, batch_size=5, accumulated=2).whole


def test_only_a_class_can_be_declared():
    for no_class in (OneByOne(TABLE), "RandomSampler"):
        with pytest.raises(TypeError, match="need a class of samplers"):
            register_sampler(no_class)
