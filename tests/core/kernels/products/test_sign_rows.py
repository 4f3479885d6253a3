"""Random signs are drawn when they are needed: the same ones at each time, and those of one matrix."""

import torch

from lightning_conv.kernels.products.combinations import SignRows


def test_they_are_the_rows_of_one_matrix_of_signs_whichever_are_asked_for():
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(0, 2, (5, 1001), generator=torch.Generator().manual_seed(3)) * 2.0 - 1.0
    first, second = (SignRows(count, 1001, generator, 0.5) for count in (3, 2))
    like = torch.empty(0, dtype=torch.float64)
    for _ in range(2):
        found = torch.cat([first.taken(slice(0, 3), slice(4, 9), like), second.taken(slice(0, 2), slice(0, 1), like)])
        assert found.shape == (5, 1, 1001)
        assert torch.equal(found[:, 0], 0.5 * whole.double())
    assert torch.equal(first.taken(slice(1, 2), slice(0, 1), like)[0, 0], 0.5 * whole[1].double())


def test_they_take_no_memory_while_nobody_asks():
    rows = SignRows(4, 10**6, torch.Generator().manual_seed(0), 1.0)
    held = sum(each.numel() * each.element_size() for each in rows._states)
    assert held < 10**5
