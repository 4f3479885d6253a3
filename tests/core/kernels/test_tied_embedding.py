"""A table of words that is the weight of the head: its kernel comes from the factors of both uses, never from rows of its size."""

import copy

import pytest
import torch
from dense_kernels import assert_same, naive_gram
from kernels.networks import TiedWords

from lightning_conv import ntk_gram, plan_ntk


def words(*shape, seed=0):
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_the_kernel_is_that_of_autograd_and_no_row_is_formed(twice, padding):
    torch.manual_seed(1)
    model = TiedWords(twice=twice, padding=padding).double()
    inputs = words(6, 4)
    assert bool((inputs == 2).any())
    gram = ntk_gram(model, inputs)
    assert [each.way for each in gram.plan.contributions if "table.weight" in each.parameters] == ["tied Gram"]
    assert_same(gram.matrix, naive_gram(model, inputs, "trace"))
    others = words(3, 4, seed=5)
    both = naive_gram(model, torch.cat([inputs, others]), "trace")
    assert_same(ntk_gram(model, inputs, others).matrix, both[:6, 6:])


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
def test_the_floor_holds(precision):
    torch.manual_seed(1)
    model = TiedWords(twice=True)
    inputs = words(9, 5)
    gram = ntk_gram(model, inputs, precision=precision)
    truth = naive_gram(copy.deepcopy(model), inputs, "trace")
    allowed = gram.floor + (2 * gram.jacobian_error + gram.jacobian_error**2) * gram.trace
    assert float(torch.linalg.matrix_norm(gram.matrix - truth, 2)) <= allowed


def test_outputs_that_are_kept_apart_are_taken_row_by_row():
    torch.manual_seed(1)
    model, inputs = TiedWords().double(), words(4, 3)
    full, trace = ntk_gram(model, inputs, outputs="full"), ntk_gram(model, inputs)
    assert "tied Gram" not in {each.way for each in full.plan.contributions}
    outputs = full.n_outputs
    assert_same(full.matrix.view(4, outputs, 4, outputs).diagonal(dim1=1, dim2=3).sum(-1), trace.matrix)


def test_it_takes_less_memory_than_rows_of_the_size_of_the_table():
    table, head = torch.nn.Embedding(5000, 64), torch.nn.Linear(64, 5000, bias=False)
    head.weight = table.weight
    model, inputs = torch.nn.Sequential(table, head), torch.randint(5000, (8, 16))
    plan = plan_ntk(model, inputs, cotangents=torch.randn(8, 16, 5000))
    (one,) = plan.contributions
    assert one.kept_bytes(1) < 4 * 5000 * 64 / 3
