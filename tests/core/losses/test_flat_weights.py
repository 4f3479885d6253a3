"""Named weights and one vector of them are the same numbers in the same order."""

import torch

from lightning_conv.losses.flat_weights import FlatWeights


def test_a_vector_is_cut_into_the_tensors_it_was_made_of():
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(()), "c": torch.randn(4)}
    flat = FlatWeights.of(tensors)
    x = flat.flatten(dict(reversed(tensors.items())))
    assert (flat.names, flat.size, len(x)) == (("b", "a", "c"), 11, 11)
    assert torch.equal(x[:6], tensors["b"].flatten())
    again = flat.unflatten(x)
    assert list(again) == ["b", "a", "c"]
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    again["a"].zero_()
    assert x[6] == 0  # views
