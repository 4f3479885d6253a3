"""Images go through the network with their channels innermost, unless its forward was written for another layout."""

import pytest
import torch
from dense_kernels import assert_same
from torch import nn

from lightning_conv import ntk_gram, plan_ntk


class ViewFirst(nn.Module):
    """An MLP on CIFAR-like images, as it is often written."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3 * 4 * 4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.view(len(x), -1))))


class ViewAfterConvolution(nn.Module):
    """A LeNet: its features keep the layout of the images, and ``view`` wants them channels first."""

    def __init__(self, channels=3):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 3, 2)
        self.head = nn.Linear(3 * 2 * 2, 2)

    def forward(self, x):
        x = torch.tanh(nn.functional.max_pool2d(self.first(x), 2))
        return self.head(torch.tanh(self.second(x)).view(x.size(0), -1))


class Asserts(ViewFirst):
    def forward(self, x):
        assert x.is_contiguous()
        return super().forward(x)


class Doubling(torch.autograd.Function):
    """Takes any layout on the way forward, and one on the way back."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.view(len(gradient), -1).view(gradient.shape)


class ViewsBackwards(ViewAfterConvolution):
    def forward(self, x):
        features = Doubling.apply(self.first(x))
        return self.head(self.second(torch.tanh(features)).mean((2, 3)).repeat(1, 4))


NETWORKS = {
    "view": (ViewFirst, (3, 4, 4)),
    "view after a convolution": (ViewAfterConvolution, (3, 8, 8)),
    "an assertion": (Asserts, (3, 4, 4)),
    "view in a backward pass": (ViewsBackwards, (3, 5, 5)),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_forward_that_insists_on_its_layout_gets_it(case, naive_gram):
    build, shape = NETWORKS[case]
    model, inputs = build().double(), torch.randn(6, *shape).double()
    plan = plan_ntk(model, inputs)
    assert not plan.reading.channels_last
    for outputs in ("trace", "full", "sum"):
        gram = ntk_gram(model, inputs, outputs=outputs)
        assert not gram.general
        assert_same(gram.matrix, naive_gram(model, inputs, outputs), 1e-12)
    whole = naive_gram(model, inputs, "trace")
    assert_same(ntk_gram(model, inputs[:2], inputs[2:]).matrix, whole[:2, 2:], 1e-12)
    assert_same(ntk_gram(model, inputs, plan=plan).matrix, whole, 1e-12)
    assert_same(ntk_gram(model, inputs, engine="jacobian").matrix, whole, 1e-12)


def test_one_channel_is_the_same_in_both_layouts(naive_gram):
    model, inputs = ViewAfterConvolution(1).double(), torch.randn(5, 1, 8, 8).double()
    assert_same(ntk_gram(model, inputs).matrix, naive_gram(model, inputs, "trace"), 1e-12)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_passes_use_the_layout_that_was_read(refuses):
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 2))

    def look(module, args):
        innermost = args[0].is_contiguous(memory_format=torch.channels_last)
        if innermost and refuses:
            raise RuntimeError("not this layout")
        seen.append(innermost)

    model.register_forward_pre_hook(look)
    plan = plan_ntk(model, torch.randn(6, 3, 5, 5))
    read = len(seen)
    gram = ntk_gram(model, torch.randn(6, 3, 5, 5), plan=plan)
    assert set(seen[read:]) == {not refuses}  # the plan is not read again: these are the passes
    assert set(seen[:read]) == (
        {False} if refuses else {True, False}
    )  # autograd's gradients are had as the caller gave
    assert plan.reading.channels_last == gram.plan.reading.channels_last == (not refuses)


def test_an_error_that_is_not_the_layouts_is_the_forwards_own():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        ntk_gram(ViewFirst(), torch.randn(5, 3, 5, 5))
