"""Heads that are linear layers by class or by name, and not by what the network computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from adversary import Case, Kind
from judge import judge
from runs import Run, plain
from torch import Tensor, nn


class Head(nn.Linear):
    """A linear layer with another forward."""

    def __init__(
        self, inputs: int, outputs: int, function: Callable[[Head, Tensor], Tensor], bias: bool = True
    ) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.function = function
        self.register_buffer("mask", (torch.arange(inputs) < 2).float().expand(outputs, inputs).clone())
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


def renormalised(m: Head, h: Tensor) -> Tensor:
    with torch.no_grad():
        m.weight.copy_(torch.renorm(m.weight, 2, 0, 0.1))
    return F.linear(h, m.weight, m.bias)


def some_samples(m: Head, h: Tensor) -> Tensor:
    u = F.linear(h, m.weight, m.bias)
    return torch.where(h[:, :1] > m.seen, u.clamp(-0.01, 0.01), u)


def straight_through(m: Head, h: Tensor) -> Tensor:
    w = m.weight + (m.weight.sign() * 0.1 - m.weight).detach()
    return F.linear(h, w, m.bias)


FORWARDS: dict[str, Callable[[Head, Tensor], Tensor]] = {
    "cosine": lambda m, h: F.linear(F.normalize(h), F.normalize(m.weight)),
    "cosine of the weight": lambda m, h: F.linear(h, F.normalize(m.weight)),
    "equalised": lambda m, h: F.linear(h, m.weight * m.in_features**-0.5, m.bias),
    "weight clamped": lambda m, h: F.linear(h, m.weight.clamp(-0.01, 0.01), m.bias),
    "outputs clamped": lambda m, h: F.linear(h, m.weight, m.bias).clamp(-0.1, 0.1),
    "outputs capped by tanh": lambda m, h: 3 * torch.tanh(F.linear(h, m.weight, m.bias) / 3),
    "outputs of a ReLU": lambda m, h: F.linear(h, m.weight, m.bias).relu(),
    "weight masked": lambda m, h: F.linear(h, m.weight * m.mask, m.bias),
    "features masked": lambda m, h: F.linear(h * m.mask[0], m.weight, m.bias),
    "over the norm of the weight": lambda m, h: F.linear(h, m.weight, m.bias) / m.weight.norm(),
    "over the norm of the features": lambda m, h: F.linear(h, m.weight, m.bias) / h.norm(dim=1, keepdim=True),
    "over the spectral norm": lambda m, h: F.linear(h, m.weight / torch.linalg.matrix_norm(m.weight, 2), m.bias),
    "weight squared": lambda m, h: F.linear(h, m.weight.square(), m.bias),
    "weight of softplus": lambda m, h: F.linear(h, F.softplus(m.weight), m.bias),
    "weight of softmax": lambda m, h: F.linear(h, m.weight.softmax(1), m.bias),
    "weight rounded, straight through": straight_through,
    "weight of its sign": lambda m, h: F.linear(h, m.weight.sign(), m.bias),
    "weight detached": lambda m, h: F.linear(h, m.weight.detach(), m.bias),
    "bias of ReLU": lambda m, h: F.linear(h, m.weight) + m.bias.relu(),
    "bias times features": lambda m, h: F.linear(h, m.weight) * (1 + m.bias),
    "renormalised in place": renormalised,
    "clamped for some samples": some_samples,
    "less its mean over the batch": lambda m, h: F.linear(h - h.mean(0), m.weight, m.bias),
    "outputs less their mean over the batch": lambda m, h: (u := F.linear(h, m.weight, m.bias)) - u.mean(0),
    "half precision": lambda m, h: F.linear(h.half().to(h), m.weight.half().to(h), m.bias),
    "absolute outputs": lambda m, h: F.linear(h, m.weight, m.bias).abs(),
    "minus where the weight is small": lambda m, h: F.linear(
        h, torch.where(m.weight.abs() < 0.05, -m.weight, m.weight), m.bias
    ),
    "clamped where gradients are on": lambda m, h: (
        F.linear(h, m.weight, m.bias).clamp(-1e3, -1e-3) if torch.is_grad_enabled() else F.linear(h, m.weight, m.bias)
    ),
    "clamped where gradients are off": lambda m, h: (
        F.linear(h, m.weight, m.bias) if torch.is_grad_enabled() else F.linear(h, m.weight, m.bias).clamp(-0.1, 0.1)
    ),
    "clamped where the trunk is frozen": lambda m, h: (
        F.linear(h, m.weight, m.bias) if h.requires_grad else F.linear(h, m.weight, m.bias).clamp(-0.1, 0.1)
    ),
    "the two first outputs tied": lambda m, h: F.linear(h, m.weight[:1].expand_as(m.weight), m.bias),
}


def _with_rows(case: Case) -> int:
    return case.n + case.spare


def by_forward(case: Case) -> Run:
    head = Head(_with_rows(case), case.classes, FORWARDS[case.variant], bias="cosine" not in case.variant)
    run = plain(case, head=head, claimable=False)
    with torch.no_grad():
        head.seen.copy_(run.module.trunk(run.x)[:, 0].max() / 2)
    return run


def hooked(case: Case) -> Run:
    head = nn.Linear(_with_rows(case), case.classes)
    if case.variant == "hook that clamps the outputs":
        head.register_forward_hook(lambda _, __, u: u.clamp(-0.1, 0.1))
    elif case.variant == "hook that masks the features":
        head.register_forward_pre_hook(lambda _, given: (given[0] * (torch.arange(given[0].shape[1]) < 2),))
    elif case.variant == "forward of the instance":
        head.forward = lambda h: F.linear(F.normalize(h), head.weight, head.bias).tanh()
    else:
        head.extra = nn.Parameter(torch.zeros(case.classes))
        head.register_forward_hook(lambda m, _, u: u * (1 + m.extra))
    return plain(case, head=head, claimable=False)


FOLLOWS = {
    "tanh after the head": lambda m, x: m.head(m.trunk(x)).tanh(),
    "norm after the head": lambda m, x: F.normalize(m.head(m.trunk(x)), dim=1),
    "outputs standardised over the batch": lambda m, x: F.batch_norm(m.head(m.trunk(x)), None, None, training=True),
    "head called twice, even": lambda m, x: m.head(m.trunk(x)) + m.head(-m.trunk(x)),
    "head called twice, of two inputs": lambda m, x: m.head(m.trunk(x)) + m.head(m.trunk(-x)),
    "its weight alone": lambda m, x: F.linear(F.normalize(m.trunk(x)), F.normalize(m.head.weight)),
    "its result times another": lambda m, x: m.head(m.trunk(x)) * m.head(m.trunk(x)).detach().sigmoid(),
    "features scaled by the head's norm": lambda m, x: m.head(m.trunk(x) / m.head.weight.norm()),
}


def follows(case: Case) -> Run:
    return plain(case, forward=FOLLOWS[case.variant], claimable=False)


HOOKED = [
    "hook that clamps the outputs",
    "hook that masks the features",
    "forward of the instance",
    "extra parameter in a hook",
]


def build(case: Case) -> Run:
    return by_forward(case) if case.variant in FORWARDS else hooked(case) if case.variant in HOOKED else follows(case)


KIND = Kind(
    "heads",
    [*FORWARDS, *HOOKED, *FOLLOWS],
    lambda case: judge(case, build),
    ("rule", "loss", "precision", "module", "batch", "n", "inputs", "spare", "classes", "seed"),
    each=4,
)
