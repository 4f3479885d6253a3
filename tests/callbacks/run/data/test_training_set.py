"""What the guard makes of the training loader: random inputs are noticed however they are drawn, and batches that it did not expect."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torchvision.transforms import v2

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.run.data.training_set import TrainingSet
from lightning_conv.callbacks.run.ranks import Ranks


class Augmented(Dataset):
    """Images 1 x 8 x 8, none of which is its own mirror image, through a transform."""

    def __init__(self, data, transform):
        self.images, self.labels = data.tensors[0].reshape(-1, 1, 8, 8), data.tensors[1]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def flip_by_torch(image):
    return image.flip(-1) if torch.rand(1) < 0.5 else image


def flip_by_numpy(image):
    return image.flip(-1) if np.random.rand() < 0.5 else image  # noqa: NPY002


def flip_by_random(image):
    return image.flip(-1) if random.random() < 0.5 else image


def rarely(image):
    return image.flip(-1) if torch.rand(1) < 0.05 else image


def paste(batch):
    """CutMix: a corner of each image comes from its neighbour in the batch."""
    images, labels = default_collate(batch)
    rows, columns = torch.randint(2, 7, (2,)).tolist()
    images[:, :, :rows, :columns] = images.roll(1, 0)[:, :, :rows, :columns]
    return images, labels


TRANSFORMS = {
    "torchvision": v2.RandomHorizontalFlip(0.5),
    "torch": flip_by_torch,
    "numpy": flip_by_numpy,
    "random": flip_by_random,
    "rarely": rarely,
}
COLLATES = {
    "mixup": lambda batch: v2.MixUp(num_classes=10)(*default_collate(batch)),
    "cutmix": lambda batch: v2.CutMix(num_classes=10)(*default_collate(batch)),
    "by hand": paste,
}


@pytest.fixture
def training_set(make_trainer, make_module):
    """The training set of a run that is about to train on ``loader``."""

    def make(loader):
        found = []

        class Flat(type(make_module())):
            def forward(self, x):
                return super().forward(x.flatten(1))

            def on_train_start(self):
                found.append(TrainingSet(self.trainer, None, Ranks(self.trainer)))

        make_trainer(max_steps=1).fit(Flat(), loader)
        return found[0]

    return make


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("count", [96, 12])
def test_flips_are_noticed_whatever_draws_them(training_set, data, name, count):
    flipped = Augmented(TensorDataset(data.tensors[0][:count], data.tensors[1][:count]), TRANSFORMS[name])
    assert all(not torch.equal(image, image.flip(-1)) for image in flipped.images)
    assert training_set(DataLoader(flipped, batch_size=32)).is_random()


@pytest.mark.parametrize("name", COLLATES)
def test_samples_that_are_mixed_with_their_neighbours_are_noticed(training_set, data, name):
    images = Augmented(data, nn.Identity())
    assert training_set(DataLoader(images, batch_size=32, collate_fn=COLLATES[name])).is_random()


def test_what_is_read_alike_every_time_is_not_random_and_draws_no_global_random_numbers(training_set, data):
    inputs = data.tensors[0].clone()
    inputs[7] = float("nan")
    fixed = training_set(DataLoader(TensorDataset(inputs, data.tensors[1]), batch_size=32))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert not fixed.is_random()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # noqa: NPY002


class HalfTheSamples:
    """A batch sampler that draws the first half twice and never the second."""

    def __init__(self, samples, batch_size):
        self.samples, self.batch_size = samples, batch_size

    def __len__(self):
        return self.samples // self.batch_size

    def __iter__(self):
        half = self.samples // 2
        order = [*torch.randperm(half).tolist(), *torch.randperm(half).tolist()]
        yield from (order[k : k + self.batch_size] for k in range(0, self.samples, self.batch_size))


def loaders(data):
    """Loaders of 96 samples, none of which makes steps on the whole set; and the caveat."""
    weighted = WeightedRandomSampler(torch.linspace(0.1, 1, 96), 96)
    return {
        "own batches": (DataLoader(data, batch_sampler=HalfTheSamples(96, 24)), "HalfTheSamples makes the batches"),
        "own whole batches": (DataLoader(data, batch_sampler=HalfTheSamples(96, 96)), "HalfTheSamples makes"),
        "weighted": (DataLoader(data, batch_size=96, sampler=weighted), "WeightedRandomSampler may weight"),
        "replacement": (DataLoader(data, 96, sampler=RandomSampler(data, replacement=True)), "with replacement"),
        "weighted batches": (
            DataLoader(data, batch_sampler=BatchSampler(weighted, 96, False)),
            "WeightedRandomSampler may weight",
        ),
        "flips": (DataLoader(Augmented(data, flip_by_torch), 96), "inputs or targets are random"),
    }


@pytest.mark.parametrize(
    "name", ["own batches", "own whole batches", "weighted", "replacement", "weighted batches", "flips"]
)
def test_steps_that_do_not_see_every_sample_once_are_not_whole(training_set, data, name):
    loader, said = loaders(data)[name]
    found = training_set(loader)
    assert any(said in caveat for caveat in found.caveats())
    assert not found.steps_are_whole(1)
    # A sample may come several times in a batch: its curvature may be that of the steepest sample.
    assert found.smallest_batch == (96 if name == "flips" else 1)


def test_a_batch_sampler_of_torch_is_what_the_loader_would_have_made(training_set, data):
    found = training_set(DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 96, False)))
    assert found.caveats() == []
    assert found.steps_are_whole(1)
    found = training_set(DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 40, False)))
    assert found.caveats() == []
    assert not found.steps_are_whole(1)
    assert found.smallest_batch == 16
    found = training_set(DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 36, True)))
    assert found.caveats() == ["drop_last leaves out the same 24 samples in every epoch"]
    chosen = list(range(0, 96, 3))
    found = training_set(DataLoader(data, batch_sampler=BatchSampler(SubsetRandomSampler(chosen), 16, False)))
    assert (found.size, found.caveats()) == (32, [])


def test_of_a_subset_sampler_that_lightning_has_divided_among_ranks_the_subset_is_what_counts(training_set, data):
    chosen = SubsetRandomSampler(range(0, 96, 3))
    divided = DistributedSamplerWrapper(chosen, num_replicas=2, rank=0)
    found = training_set(DataLoader(data, 16, sampler=divided))
    assert (found.size, found.caveats()) == (32, [])


def test_a_sampler_that_goes_round_twice_may_repeat_a_sample_in_a_batch(training_set, data):
    found = training_set(DataLoader(data, 32, sampler=RandomSampler(data, num_samples=192)))
    assert found.smallest_batch == 16
    assert not found.steps_are_whole(6)


@pytest.mark.parametrize("batch_size", [24, 96])
def test_certified_steps_on_batches_of_the_runs_own_take_no_bound_and_never_overshoot(
    make_trainer, make_module, data, batch_size
):
    module = make_module(dropout=0.0)
    guard = ExpressivityGuard(switch_at=8, step_rule="certified")
    loader = DataLoader(data, batch_sampler=HalfTheSamples(96, batch_size))
    with pytest.warns(UserWarning, match="HalfTheSamples makes the batches itself"):
        make_trainer([guard], max_epochs=40, max_steps=20).fit(module, loader)
    assert (guard.phase, guard.verdict) == (2, "undecided")
    assert all("bound" not in entry for entry in guard.history)
    with torch.no_grad():
        hidden = module.double().eval().trunk(data.tensors[0].double())
    steepest = 0.5 * float((hidden.square().sum(1) + 1).max())
    assert guard.history[0]["step_size"] <= 1 / steepest


def test_a_loader_of_unknown_length_is_no_error(make_trainer, make_module, data):
    class Endless:
        def __iter__(self):
            while True:
                yield torch.randperm(96)[:32].tolist()

    guard = ExpressivityGuard(switch_at=4)
    with pytest.warns(UserWarning, match="Endless makes the batches itself"):
        make_trainer([guard], max_epochs=-1, max_steps=8).fit(make_module(), DataLoader(data, batch_sampler=Endless()))
    assert guard.phase == 2


@pytest.mark.slow
def test_class_weights_of_accumulated_batches_are_not_those_of_the_whole_set(make_trainer, make_module, data):
    """torch divides by the weights of the batch: the mean over three batches is another loss than that of the set."""
    order = data.tensors[1].argsort()  # the batches hold other classes
    sorted_by_class = TensorDataset(data.tensors[0][order], data.tensors[1][order])
    found = {}
    for batch_size in (96, 32):
        module, guard = make_module(), ExpressivityGuard(switch_at=3, step_rule="certified")
        module.loss_fn = nn.CrossEntropyLoss(weight=torch.linspace(0.1, 4, 10))
        make_trainer([guard], max_epochs=8, accumulate_grad_batches=96 // batch_size).fit(
            module, DataLoader(sorted_by_class, batch_size)
        )
        assert guard.phase == 2
        found[batch_size] = guard.history
    assert "bound" in found[96][-1]
    assert all("bound" not in entry for entry in found[32])


def test_certified_steps_refuse_a_sum(make_trainer, make_module, data):
    module = make_module()
    module.loss_fn = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(MisconfigurationException, match=r"reduction='sum'.*use reduction='mean'"):
        make_trainer([ExpressivityGuard(step_rule="certified")]).fit(module, DataLoader(data, 32))
