"""Embeddings and bags with ``sparse=True`` have the kernel that they have without."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dense_kernels import assert_same, naive_gram
from torch import nn

from lightning_conv import NTKOperator, ntk_gram
from lightning_conv.networks.dense_gradients import SPARSE, dense_gradients
from lightning_conv.networks.undisturbed import undisturbed

TOKENS = torch.randint(11, (5, 6), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.rand(5, 6, generator=torch.Generator().manual_seed(1))


class Bag(nn.Module):
    def __init__(self, mode="sum", padding_idx=None):
        super().__init__()
        # torch has no sparse gradient of the maximum.
        self.bag = nn.EmbeddingBag(11, 8, mode=mode, sparse=mode != "max", padding_idx=padding_idx)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens, weights=None):
        return self.head(self.bag(tokens, per_sample_weights=weights).tanh())


class Offsets(nn.Module):
    """Makes the offsets inside, from rows of tokens."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 8, mode="mean", sparse=True), nn.Linear(8, 2)

    def forward(self, tokens):
        return self.head(self.bag(tokens.flatten(), torch.arange(0, tokens.numel(), tokens.shape[1])).tanh())


class Given(Offsets):
    def forward(self, tokens, offsets):
        return self.head(self.bag(tokens, offsets).tanh())


class Functions(nn.Module):
    """Calls the functions itself, one of them on a table that is computed."""

    sparse = True

    def __init__(self):
        super().__init__()
        self.table, self.bag = nn.Parameter(torch.randn(11, 8)), nn.Parameter(torch.randn(11, 8))

    def forward(self, tokens):
        mean = F.embedding(tokens, self.table, sparse=self.sparse).tanh().mean(1)
        bag = F.embedding_bag(tokens, self.bag, sparse=self.sparse)
        return mean + bag * F.embedding(tokens[:, 0], 2 * self.bag, sparse=self.sparse)


CASES = {
    **{f"{mode}, padding {pad}": (Bag(mode, pad), TOKENS) for mode in ("sum", "mean", "max") for pad in (None, 3)},
    "weights of each token": (Bag(), (TOKENS, WEIGHTS)),
    "offsets inside": (Offsets(), TOKENS),
    "functions": (Functions(), TOKENS),
    "embedding": (nn.Sequential(nn.Embedding(11, 3, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(18, 2)), TOKENS),
}


def dense(model):
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "sparse"):
            module.sparse = False
    return twin


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_that_of_dense_gradients(name, engine):
    model, inputs = CASES[name]
    expected = naive_gram(dense(model), inputs, "trace")
    assert_same(ntk_gram(model, inputs, engine=engine, precision="certified").matrix, expected, 1e-12)
    assert_same(ntk_gram(model, inputs, engine=engine).matrix, expected, 1e-5)


def test_the_operator_takes_sparse_embeddings():
    model, inputs = CASES["embedding"]
    found = NTKOperator(model, inputs, outputs="trace", dtype=torch.float64).dense()
    assert_same(found, naive_gram(dense(model), inputs, "trace"), 1e-12)


@pytest.mark.parametrize(
    "inputs",
    [(TOKENS.flatten(), torch.tensor([0, 3, 7])), (TOKENS[0, :3], torch.tensor([0, 1, 2]))],
    ids=["three bags", "as many bags as tokens"],
)
def test_bags_by_offsets_are_refused_with_the_cure(inputs):
    with pytest.raises(ValueError, match=r"inputs: .*offsets .* are no samples: give each bag a row of its own"):
        ntk_gram(Given(), inputs)


def test_torch_has_its_own_functions_again_after_an_error():
    before = {name: getattr(torch, name) for name in SPARSE}
    model = CASES["embedding"][0]
    with pytest.raises(IndexError), undisturbed(model), dense_gradients():
        model(torch.tensor([[99]]))
    assert {name: getattr(torch, name) for name in SPARSE} == before
    model(TOKENS).sum().backward()
    assert model[0].weight.grad.is_sparse
