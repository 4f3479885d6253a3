"""Optimizers that torch does not have, as users write them, for tests of what holds for any optimizer."""

from __future__ import annotations

import torch
from torch.optim import Optimizer


def called(closure):
    """Call what computes the loss and its gradients, as Lightning hands it over."""
    if closure is not None:
        with torch.enable_grad():
            closure()


class Lion(Optimizer):
    """The sign of a mean of gradients (Chen et al. 2023, 2302.06675, algorithm 2), with decoupled decay."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.taken = 0  # an attribute of its own

    @torch.no_grad()
    def step(self, closure=None):
        called(closure)
        self.taken += 1
        for group in self.param_groups:
            one, two = group["betas"]
            for each in group["params"]:
                if each.grad is None:
                    continue
                mean = self.state[each].setdefault("mean", torch.zeros_like(each))
                each.mul_(1 - group["lr"] * group["weight_decay"])
                each.add_((one * mean + (1 - one) * each.grad).sign(), alpha=-group["lr"])
                mean.mul_(two).add_(each.grad, alpha=1 - two)


class Muon(Optimizer):
    """Momentum, whose matrices are replaced by U V^T of their singular value decomposition (Jordan et al. 2024)."""

    def __init__(self, params, lr=0.02, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        called(closure)
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is None:
                    continue
                buffer = self.state[each].setdefault("buffer", torch.zeros_like(each))
                buffer.mul_(group["momentum"]).add_(each.grad)
                u, _, v = torch.linalg.svd(buffer.reshape(len(buffer), -1), full_matrices=False)
                turned = (u @ v).reshape(each.shape) if each.ndim > 1 else buffer
                each.add_(turned, alpha=-group["lr"])


class Lookahead(Optimizer):
    """Steps with another optimizer and goes half way back every second step; shares its groups and state."""

    def __init__(self, inner):
        self.inner, self.count = inner, 0
        super().__init__(inner.param_groups, {})
        self.slow = {each: each.detach().clone() for group in inner.param_groups for each in group["params"]}
        self.param_groups, self.state = inner.param_groups, inner.state

    @torch.no_grad()
    def step(self, closure=None):
        called(closure)
        self.inner.step()
        self.count += 1
        if self.count % 2 == 0:
            for each, slow in self.slow.items():
                slow.add_(each - slow, alpha=0.5)
                each.copy_(slow)
