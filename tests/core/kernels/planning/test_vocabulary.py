"""The memory of kernels of language models: a few forwards of one sample, however large the vocabulary and however many samples."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_conv import ntk_gram, plan_ntk
from lightning_conv.kernels.planning.plan import make_plan
from lightning_conv.kernels.reading.timing import AloneTiming

POSITIONS = 8


class Peak(TorchDispatchMode):
    """Count the bytes of all tensors that are made inside and still alive, and keep their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.freed, storage._cdata)
        return result

    def freed(self, key):
        self.live -= self.sizes.pop(key, 0)


class Words(nn.Module):
    def __init__(self, vocabulary, width=8):
        super().__init__()
        self.table, self.mixed = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words):
        return self.head(torch.tanh(self.mixed(self.table(words)).cumsum(1)))


def of(vocabulary, samples, outputs):
    torch.manual_seed(0)
    words = torch.randint(vocabulary, (samples, POSITIONS))
    options = {"precision": "fast"}  # "exact" takes 16 MiB for copies in float64, however small the network
    if outputs == "projected":
        return Words(vocabulary), words, options | {"outputs": "projected", "projections": 4}
    return Words(vocabulary), words, options | {"cotangents": torch.randn(samples, POSITIONS, vocabulary)}


def test_the_counter_counts_what_is_alive():
    with Peak() as counted:
        one = torch.zeros(1000)
        view = one[:10]
        del one
        assert counted.live == 4000
        del view
        torch.zeros(500)
    assert (counted.peak, counted.live) == (4000, 0)


@pytest.mark.parametrize("outputs", ["loss", "projected"])
def test_more_samples_take_no_more_memory_and_more_words_only_that_of_a_forward(outputs):
    forwards = {}
    for vocabulary in (10_000, 50_257):
        logits = 4 * POSITIONS * vocabulary
        for samples in (16, 48):
            model, words, options = of(vocabulary, samples, outputs)
            allowed = 24 * logits + 2**23
            plan = plan_ntk(model, words, max_memory=allowed, **options)
            with Peak() as counted:
                gram = ntk_gram(model, words, max_memory=allowed, **options)
            assert counted.peak <= plan.bytes
            assert plan.sample_bytes >= logits
            forwards[vocabulary, samples] = counted.peak / logits
            if (vocabulary, samples) == (10_000, 16):
                roomy = ntk_gram(model, words, **options).matrix
                torch.testing.assert_close(gram.matrix, roomy, rtol=1e-4, atol=1e-4 * float(roomy.diagonal().max()))
    # In units of one sample's logits, of which 48 samples have 32 more.
    assert forwards[50_257, 48] - forwards[50_257, 16] < 2
    assert forwards[50_257, 48] < 1.1 * forwards[10_000, 48]


def test_the_plan_says_what_one_sample_takes():
    model, words, options = of(50_257, 4, "projected")
    plan = plan_ntk(model, words, **options)
    assert f"one sample takes {plan.sample_bytes / 2**20:.3g}"[:22] in str(plan)
    assert plan.sample_bytes >= 4 * POSITIONS * 50_257


def test_samples_that_couple_are_refused_where_only_a_part_of_their_outputs_is_compared():
    class Coupled(Words):
        def forward(self, words):
            return super().forward(words) + self.table(words).mean()

    torch.manual_seed(0)
    vocabulary = 50_257
    model, words = Coupled(vocabulary), torch.randint(vocabulary, (16, POSITIONS))
    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(model, words, outputs="projected", projections=4, max_memory=30 * 4 * POSITIONS * vocabulary)


@pytest.mark.parametrize("roomy", [True, False])
def test_the_seconds_are_those_of_as_many_samples_as_go_through_the_network_together(roomy):
    vocabulary, samples = 50_257, 6
    model, words, options = of(vocabulary, samples, "loss")
    read = plan_ntk(model, words, **options)
    assert read.reading.alone.forward > 0
    assert read.reading.alone.measuring > read.reading.alone.backward > 0
    alone = AloneTiming(forward=1e3, backward=1e4, measuring=1e6, outside=False)
    anatomy = replace(read.reading, forward_seconds=1.0, backward_seconds=10.0, alone=alone)
    allowed = 2**30 if roomy else 20 * 4 * POSITIONS * vocabulary

    def seconds(anatomy=anatomy, **more):
        sizes = {"precision": "fast", "matrices": 1, "repeats": 1, "max_memory": allowed}
        plan = make_plan(anatomy, read.problem, device=torch.device("cpu"), **sizes, **more)
        assert len(plan.passes) == 1
        assert (plan.passes[0].tile > 1) is roomy
        return plan.seconds

    products = seconds(replace(anatomy, forward_seconds=0.0, backward_seconds=0.0, alone=None))
    passes = samples * (11 if roomy else 11_000)
    assert seconds() - products == pytest.approx(passes, rel=0.01)
    assert seconds(measured=2) - products == pytest.approx(passes + 2e6, rel=0.01)
    assert seconds(staging_seconds=100.0) - products == pytest.approx(passes + 100, rel=0.01)
    outside = replace(anatomy, alone=replace(alone, outside=True))  # two forwards of three samples
    assert seconds(outside) - products == pytest.approx(passes + 6, rel=0.01)
