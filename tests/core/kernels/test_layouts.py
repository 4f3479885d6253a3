"""Images go through the network with their channels innermost, unless its forward was written for another layout."""

import pytest
import torch
from dense_kernels import assert_same
from kernels.cases import LAYOUTS, build, kernel
from kernels.networks import ViewFirst
from torch import nn

from lightning_conv import ntk_gram, plan_ntk


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_forward_that_insists_on_its_layout_gets_it(case):
    model, inputs = build(case)
    plan = plan_ntk(model, inputs)
    assert not plan.reading.channels_last
    for outputs in ("trace", "full", "sum"):
        gram = ntk_gram(model, inputs, outputs=outputs)
        assert not gram.general
        assert_same(gram.matrix, kernel(case, outputs), 1e-12)
    whole = kernel(case, "trace")
    assert_same(ntk_gram(model, inputs[:2], inputs[2:]).matrix, whole[:2, 2:], 1e-12)
    assert_same(ntk_gram(model, inputs, plan=plan).matrix, whole, 1e-12)
    assert_same(ntk_gram(model, inputs, engine="jacobian").matrix, whole, 1e-12)


def test_one_channel_is_the_same_in_both_layouts():
    gram = ntk_gram(*build("cnn of one channel"))
    assert_same(gram.matrix, kernel("cnn of one channel", "trace"), 1e-12)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_passes_use_the_layout_that_was_read(refuses):
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            innermost = x.is_contiguous(memory_format=torch.channels_last)
            if innermost and refuses:
                raise RuntimeError("not this layout")
            seen.append(innermost)
            return x

    model = nn.Sequential(Looks(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 2))
    plan = plan_ntk(model, torch.randn(6, 3, 5, 5))
    read = len(seen)
    gram = ntk_gram(model, torch.randn(6, 3, 5, 5), plan=plan)
    # The plan is not read again: after the trial of the copy, as the caller gave, these are the passes.
    assert set(seen[read + 1 :]) == {not refuses}
    assert set(seen[:read]) == (
        {False} if refuses else {True, False}
    )  # autograd's gradients are had as the caller gave
    assert plan.reading.channels_last == gram.plan.reading.channels_last == (not refuses)


def test_an_error_that_is_not_the_layouts_is_the_forwards_own():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        ntk_gram(ViewFirst(), torch.randn(5, 3, 5, 5))
