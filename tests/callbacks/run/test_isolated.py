"""The generators of the process are put back after a block, however it ends."""

import random

import numpy as np
import pytest
import torch

from lightning_conv.callbacks.run.isolated import isolated, seed_all


def draw():
    return torch.rand(3).tolist(), random.random(), float(np.random.rand())  # noqa: NPY002


def seed(number):
    torch.manual_seed(number), random.seed(number), np.random.seed(number)  # noqa: NPY002


def test_what_is_drawn_after_the_block_is_what_would_have_been_drawn_without_it():
    seed(1)
    expected = draw()
    seed(1)
    with isolated():
        inside = draw()
        seed(9)
        draw()
    assert inside == expected
    assert draw() == expected


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_so_it_is_after_an_error_which_goes_on(error):
    seed(1)
    expected = draw()
    seed(1)

    def fail():
        with isolated():
            draw()
            raise error

    with pytest.raises(error):
        fail()
    assert draw() == expected


def test_blocks_may_stand_in_one_another():
    seed(1)
    expected = [draw(), draw()]
    seed(1)
    with isolated():
        draw()
        with isolated():
            draw()
        assert draw() == expected[1]
    assert draw() == expected[0]


def test_seeding_is_that_of_torch_and_notes_nothing_for_a_device_that_nothing_has_used(monkeypatch):
    noted = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", lambda *args, **kwargs: noted.append(args))
    seed_all(7)
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert not noted
