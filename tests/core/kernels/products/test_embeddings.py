"""``NTKOperator`` of networks with embeddings: the kernel is that of the gradients, whichever words are among the first samples."""

import pytest
import torch
from dense_kernels import assert_same, naive_gram
from torch import nn

from lightning_conv.kernels import NTKOperator

WORDS, PADDING = 7, 2


class Words(nn.Module):
    def __init__(self, *, tied=False, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 5, **options), nn.Linear(5, WORDS, bias=False)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(WORDS, 5))  # the row of the padding, too
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words):
        return self.head(torch.tanh(self.table(words)))


class Bag(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(WORDS, 5, **options), nn.Linear(5, 3)

    def forward(self, words):
        return self.head(torch.tanh(self.table(words)))


def words(padded=True):
    """Six samples of three words; the padding is in the last two only, which are not looked at first."""
    drawn = torch.randint(3, WORDS, (6, 3), generator=torch.Generator().manual_seed(0))
    if padded:
        drawn[4, 1] = drawn[5, 0] = PADDING
    return drawn


def whole(operator):
    return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [PADDING, PADDING - WORDS, None])
def test_a_padding_that_comes_late_has_no_gradient(tied, padding):
    torch.manual_seed(1)
    model, inputs = Words(tied=tied, padding_idx=padding).double(), words()
    operator = NTKOperator(model, inputs)
    assert_same(whole(operator), naive_gram(model, inputs, "full"))
    assert (operator.jvp_method == "double backward") == (padding is not None)
    assert "padding_idx" in (operator.jvp_reason or "") or padding is None


def test_a_frozen_table_needs_no_second_backward():
    model = Words(padding_idx=PADDING).double()
    model.table.requires_grad_(False)
    operator = NTKOperator(model, words())
    assert operator.jvp_method == "forward mode"
    assert_same(whole(operator), naive_gram(model, words(), "full"))


def test_gradients_that_are_scaled_by_the_frequency_are_refused_although_no_word_comes_twice_at_first():
    inputs = torch.tensor([[3], [4], [5], [3], [3]])
    with pytest.raises(RuntimeError, match="scale_grad_by_freq=True"):
        NTKOperator(Words(scale_grad_by_freq=True).double(), inputs)


def test_rows_that_are_made_shorter_are_right_in_a_table_of_its_own_and_refused_in_a_tied_one():
    torch.manual_seed(1)
    model, inputs = Words(max_norm=0.5).double(), words()
    assert float(model.table.weight.norm(dim=1).min()) > 0.5
    before = model.table.weight.detach().clone()
    operator = NTKOperator(model, inputs)
    assert torch.equal(model.table.weight, before)
    assert_same(whole(operator), naive_gram(model, inputs, "full"))
    with pytest.raises(ValueError, match="the outputs of the first 2 samples change"):
        NTKOperator(Words(tied=True, max_norm=0.5).double(), inputs)


@pytest.mark.parametrize("options", [{}, {"padding_idx": PADDING}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_bags_of_words_are_refused(mode, options):
    with pytest.raises(RuntimeError, match="use ntk_gram"):
        NTKOperator(Bag(mode=mode, **options).double(), words())
