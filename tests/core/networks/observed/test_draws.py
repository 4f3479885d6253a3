"""Random tensors are given again as they were drawn."""

from __future__ import annotations

import pytest
import torch

from lightning_conv.networks.observed.draws import Draws


def drawing():
    x = torch.zeros(4, 2)
    return [
        torch.randn(4, 2),
        torch.rand_like(x),
        torch.randint(9, (4,)),
        torch.randperm(4),
        torch.empty(3).normal_(),
        torch.empty(2).uniform_(2.0, 3.0),
        torch.bernoulli(x + 0.5),
        torch.distributions.Normal(x, 1.0).rsample(),
        torch.distributions.Categorical(logits=x).sample(),
        torch.randn(2, generator=torch.Generator().manual_seed(1)),
    ]


def test_what_was_drawn_is_given_again_whatever_the_generator():
    draws = Draws()
    with draws.recording():
        first = drawing()
    before = torch.get_rng_state()
    with draws.replaying():
        second = drawing()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(draws.drawn) == len(first)


def test_a_draw_too_many_is_refused():
    with Draws([torch.zeros(2)]).replaying():
        torch.randn(2)
        with pytest.raises(LookupError, match="more random numbers"):
            torch.randn(2)
