"""A backward pass that does not give the gradient of the value is found; those of torch's losses are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_conv.losses.slope import wrong_slope

N, CLASSES = 64, 5


def drawn(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    u = scale * torch.randn(N, CLASSES, generator=generator)
    return u, torch.randint(0, CLASSES, (N,), generator=generator), torch.randn(N, CLASSES, generator=generator)


LOSSES = {
    "cross-entropy": lambda u, y, t: F.cross_entropy(u, y),
    "smoothed": lambda u, y, t: F.cross_entropy(u, y, label_smoothing=0.1),
    "one sample": lambda u, y, t: F.cross_entropy(u[:1], y[:1]),
    "mse": lambda u, y, t: F.mse_loss(u, t),
    "far targets": lambda u, y, t: F.mse_loss(u, 1e6 * t),
    "l1": lambda u, y, t: F.l1_loss(u, t),
    "huber": lambda u, y, t: F.huber_loss(u, t, delta=0.1),
    "hinge": lambda u, y, t: F.multi_margin_loss(u, y),
    "poisson": lambda u, y, t: F.poisson_nll_loss(u, t.abs()),
    "bce": lambda u, y, t: F.binary_cross_entropy_with_logits(u, (t > 0).float()),
    "bounded": lambda u, y, t: (1 - torch.exp(-((u - t) ** 2))).mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_torch_are_right(name, scale, dtype):
    u, y, t = drawn(scale)
    u, t = u.to(dtype), t.to(dtype)
    assert [wrong_slope(lambda v: LOSSES[name](v, y, t), u, seed) for seed in range(20)] == [""] * 20


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, factor):
        ctx.save_for_backward(factor)
        return u.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0], None


@pytest.mark.parametrize("name", ["cross-entropy", "mse", "l1", "hinge"])
@pytest.mark.parametrize("factor", ["reversed", "halved", "some samples without", "one output without"])
def test_other_gradients_are_found(name, factor):
    u, y, t = drawn()
    scales = {
        "reversed": torch.tensor(-1.0),
        "halved": torch.tensor(0.5),
        "some samples without": (y != 1).float()[:, None],
        "one output without": torch.eye(CLASSES)[0].neg().add(1),
    }
    found = [wrong_slope(lambda v: LOSSES[name](Scaled.apply(v, scales[factor]), y, t), u, seed) for seed in range(8)]
    assert sum(map(bool, found)) >= 6
