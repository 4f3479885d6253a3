"""Training steps that minimise something else than the mean of a loss of the network's outputs over the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from adversary import Case, Kind
from judge import judge
from runs import Run, loss_of, plain
from torch import Tensor, nn

# step(net, batch, loss) -> Tensor; net.head is an honest linear head throughout
Step = Callable[[Any, Any, Callable[..., Tensor]], Tensor]


def weights(net: Any) -> Tensor:
    return sum(p.square().sum() for p in net.parameters())  # type: ignore[return-value]


def plus(term: Callable[[Any, Any], Tensor]) -> Step:
    return lambda net, b, loss: loss(net(b[0]), b[1]) + term(net, b)


def late(term: Callable[[Any, Any], Tensor], begins: Callable[[Any], bool]) -> Step:
    return lambda net, b, loss: loss(net(b[0]), b[1]) + (term(net, b) if begins(net) else 0.0)


def shifted(y: Tensor) -> Tensor:
    return (1 - y) if y.ndim > 1 and y.max() <= 1 and y.min() >= 0 else y.roll(1, 0)


def mixup(net: Any, b: Any, loss: Callable[..., Tensor]) -> Tensor:
    share, order = 0.7, torch.arange(len(b[0])).roll(1)
    u = net(share * b[0] + (1 - share) * b[0][order])
    return share * loss(u, b[1]) + (1 - share) * loss(u, b[1][order])


def masked(net: Any, b: Any, loss: Callable[..., Tensor]) -> Tensor:
    keep = torch.arange(len(b[0])) % 3 > 0
    return loss(net(b[0])[keep], b[1][keep])


def per_sample(loss: Callable[..., Tensor], u: Tensor, y: Tensor) -> Tensor:
    function = (
        type(loss)(reduction="none") if isinstance(loss, nn.Module) else lambda a, c: loss(a, c, reduction="none")
    )
    return function(u, y).flatten(1).mean(1) if u.ndim == function(u, y).ndim else function(u, y)


def of_samples(combine: Callable[[Tensor], Tensor]) -> Step:
    return lambda net, b, loss: combine(per_sample(loss, net(b[0]), b[1]))


def two_passes(net: Any, b: Any, loss: Callable[..., Tensor]) -> Tensor:
    return loss(net(b[0]), b[1]) + (net(b[0] + 0.1) - net(b[0])).square().mean()


def contrastive(net: Any, b: Any, loss: Callable[..., Tensor]) -> Tensor:
    u = net(b[0])
    return loss(u, b[1]) + F.cross_entropy(u @ u.T, torch.arange(len(u)))


def ranking(net: Any, b: Any, loss: Callable[..., Tensor]) -> Tensor:
    u = net(b[0])
    return loss(u, b[1]) + F.softplus(u[:, None, 0] - u[None, :, 0]).mean()


def by_batch_statistics(net: Any, b: Any, loss: Callable[..., Tensor]) -> Tensor:
    u = net(b[0])
    return loss((u - u.mean(0)) / (u.std(0) + 0.1), b[1])


def own_cosine(net: Any, b: Any, loss: Callable[..., Tensor]) -> Tensor:
    net.head(net.trunk(b[0]))
    return loss(F.linear(F.normalize(net.trunk(b[0])), F.normalize(net.head.weight)), b[1])


STEPS: dict[str, Step] = {
    "penalty on all weights": plus(lambda net, b: 0.1 * weights(net)),
    "penalty on the head": plus(lambda net, b: 0.1 * net.head.weight.square().sum()),
    "penalty on the head's bias": plus(lambda net, b: 0.1 * net.head.bias.square().sum()),
    "L1 penalty on the head": plus(lambda net, b: 0.1 * net.head.weight.abs().sum()),
    "penalty on the norm of the head, off at first": plus(lambda net, b: F.relu(net.head.weight.norm() - 5)),
    "penalty on the trunk": plus(lambda net, b: 0.1 * net.trunk[0].weight.square().sum()),
    "penalty on the outputs of all": plus(lambda net, b: 0.1 * net(b[0]).mean().square()),
    "penalty on the features": plus(lambda net, b: 0.1 * net.trunk(b[0]).square().mean()),
    "penalty by a gradient of its own": plus(lambda net, b: (w := net.head.weight.square().sum()) - w.detach()),
    "detached penalty": plus(lambda net, b: 0.1 * weights(net).detach()),
    "loss times a detached norm": lambda net, b, loss: loss(net(b[0]), b[1]) * net.head.weight.detach().norm(),
    "loss that is half detached": lambda net, b, loss: loss(net(b[0]).detach(), b[1]) + 0 * net(b[0]).sum(),
    "gradient of another loss": lambda net, b, loss: (
        (r := 2 * net(b[0]).abs().sum()) - r.detach() + loss(net(b[0]), b[1])
    ),
    "loss of detached features": lambda net, b, loss: loss(net.head(net.trunk(b[0]).detach()), b[1]),
    "labels shifted": lambda net, b, loss: loss(net(b[0]), shifted(b[1])),
    "noise on the targets": lambda net, b, loss: loss((u := net(b[0])) + 0.3 * torch.randn_like(u), b[1]),
    "outputs halved": lambda net, b, loss: loss(net(b[0]) / 2 + 0.5, b[1]),
    "loss doubled": lambda net, b, loss: 2 * loss(net(b[0]), b[1]),
    "loss negated": lambda net, b, loss: -loss(net(b[0]), b[1]),
    "root of the loss": lambda net, b, loss: (loss(net(b[0]), b[1]) + 1e-3).sqrt(),
    "flooded": lambda net, b, loss: (loss(net(b[0]), b[1]) - 0.5).abs() + 0.5,
    "clamped from above": lambda net, b, loss: loss(net(b[0]), b[1]).clamp(max=0.3) + 0.01 * loss(net(b[0]), b[1]),
    "clamped from below": lambda net, b, loss: loss(net(b[0]), b[1]).clamp(min=0.2),
    "mixup": mixup,
    "samples left out": masked,
    "hardest samples alone": of_samples(lambda each: each.topk(max(1, len(each) // 2)).values.mean()),
    "largest loss": of_samples(lambda each: each.max()),
    "median loss": of_samples(lambda each: each.median() + 0.1 * each.mean()),
    "over the largest loss": of_samples(lambda each: each.mean() / each.max().detach().clamp(min=0.1)),
    "weighted by detached losses": of_samples(lambda each: (each.detach() * each).mean()),
    "focal": of_samples(lambda each: ((1 - (-each).exp()).square() * each).mean()),
    "weighted by position": of_samples(lambda each: (each * torch.linspace(0.1, 1, len(each))).mean()),
    "logarithm of the mean exponential": of_samples(lambda each: each.exp().mean().log()),
    "summed": of_samples(lambda each: each.sum()),
    "tilted": of_samples(lambda each: each.mean() + each.var()),
    "consistency of two passes": two_passes,
    "contrastive": contrastive,
    "pairwise ranking": ranking,
    "outputs standardised over the batch": by_batch_statistics,
    "a cosine classifier of its own": own_cosine,
    "noise on the features": lambda net, b, loss: loss(net.head(net.trunk(b[0]) + 0.3 * torch.randn(1)), b[1]),
    "penalty after some steps": late(lambda net, b: 0.1 * weights(net), lambda net: net.global_step >= 2),
    "penalty in the last epoch": late(lambda net, b: 0.1 * weights(net), lambda net: net.current_epoch >= 2),
    "penalty of the trainer's step": late(lambda net, b: 0.1 * weights(net), lambda net: net.trainer.global_step > 1),
    "penalty on a frozen trunk": late(
        lambda net, b: 0.1 * net.head.weight.square().sum(), lambda net: not net.trunk[0].weight.requires_grad
    ),
    "penalty in eval mode": late(lambda net, b: 0.1 * net.head.weight.square().sum(), lambda net: not net.training),
    "penalty growing with the steps": lambda net, b, loss: (
        loss(net(b[0]), b[1]) + 0.01 * net.global_step * weights(net)
    ),
}


OBSERVED = {"summed", "loss of detached features"}
"""Steps whose loss is one of torch's losses of the network's outputs, as the guard finds out by itself."""


def build(case: Case) -> Run:
    loss, chosen = loss_of(case), STEPS[case.variant]

    def step(net: Any, batch: Any) -> Tensor:
        return chosen(net, batch, net.loss_fn if hasattr(net, "loss_fn") else loss)

    return plain(case, step=step, claimable=case.variant in OBSERVED, covered=False)


KIND = Kind(
    "steps",
    list(STEPS),
    lambda case: judge(case, build),
    ("rule", "loss", "precision", "module", "batch", "n", "inputs", "spare", "classes", "seed"),
    each=3,
)
