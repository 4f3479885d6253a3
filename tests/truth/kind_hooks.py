"""Hooks and overrides that change what the optimizer gets, or what it does, after an honest loss."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from adversary import Case, Kind
from judge import judge
from lightning.pytorch import Callback
from runs import Run, plain
from torch import Tensor


def on(name: str, function: Callable[..., Any]) -> Callable[[Run], None]:
    def put(run: Run) -> None:
        setattr(run.module, name, types.MethodType(function, run.module))

    return put


def callback(name: str, function: Callable[..., None]) -> Callable[[Run], None]:
    def put(run: Run) -> None:
        class Changes(Callback):
            pass

        setattr(Changes, name, function)
        run.trainer["callbacks"] = [Changes()]

    return put


@torch.no_grad()
def change(net: Any, factor: float = 1.0, pull: float = 0.1) -> None:
    for each in net.head.parameters():
        if each.grad is not None:
            each.grad.mul_(factor).add_(each, alpha=pull)


def own_backward(self: Any, loss: Tensor, *_: Any) -> None:
    (loss + 0.1 * self.head.weight.square().sum()).backward()


def own_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
    optimizer.step(closure=closure)
    with torch.no_grad():
        self.head.weight.mul_(0.9)


def normalised_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
    def changed() -> Any:
        loss = closure()
        change(self)
        return loss

    optimizer.step(closure=changed)


def decayed(run: Run) -> None:
    run.module.optimizer = {"lr": 0.05, "weight_decay": 0.1}


def adamw(run: Run) -> None:
    run.module.configure_optimizers = lambda: torch.optim.AdamW(run.module.parameters(), lr=1e-3, weight_decay=0.1)


def group(run: Run) -> None:
    m = run.module
    m.configure_optimizers = lambda: torch.optim.SGD(
        [{"params": m.trunk.parameters()}, {"params": m.head.parameters(), "weight_decay": 0.1}], lr=0.05
    )


def on_weight(kind: str) -> Callable[[Run], None]:
    def put(run: Run) -> None:
        w = run.module.head.weight
        if kind == "post":
            w.register_post_accumulate_grad_hook(lambda p: p.grad.add_(p.detach(), alpha=0.1) is None or None)
        elif kind == "sparse":
            w.register_hook(lambda g: g * (g.abs() > g.abs().median()))
        else:
            w.register_hook(lambda g: g + 0.1 * w.detach())

    return put


def module_hook(kind: str) -> Callable[[Run], None]:
    def put(run: Run) -> None:
        head = run.module.head
        if kind == "pre":
            head.register_full_backward_pre_hook(lambda _, given: (given[0] * 0.5 + 0.01,))
        else:
            run.module.trunk.register_full_backward_hook(
                lambda _, given, __: tuple(None if g is None else 0.5 * g for g in given)
            )
            head.weight.register_hook(lambda g: -g)

    return put


def constrained(run: Run) -> None:
    def step(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure)
        with torch.no_grad():
            self.head.weight.clamp_(-0.05, 0.05)

    on("optimizer_step", step)(run)


def late(name: str, function: Callable[..., Any]) -> Callable[[Run], None]:
    """Let a hook of the module act from the third epoch of four on."""

    def hook(self: Any, *given: Any, **named: Any) -> Any:
        return function(self, *given, **named) if self.current_epoch >= 2 else None

    return on(name, hook)


def clamp(net: Any, *_: Any) -> None:
    net.head.weight.data.clamp_(-0.05, 0.05)


def late_for_a_step(run: Run) -> None:
    """Scale the features during the steps of the last two epochs."""
    scale = {"now": 1.0}
    run.module.trunk.append(torch.nn.Module())
    run.module.trunk[-1].forward = lambda h: scale["now"] * h
    on("on_train_batch_start", lambda self, *_: scale.update(now=0.0 if self.current_epoch >= 2 else 1.0))(run)
    on("on_train_batch_end", lambda self, *_: scale.update(now=1.0))(run)


def relabelled(batch: Any) -> None:
    batch[1].copy_(batch[1].flip(0))


def post_hook(run: Run) -> None:
    made = run.module.configure_optimizers()
    made.register_step_post_hook(lambda *_: run.module.head.weight.data.mul_(0.9) is None or None)
    run.module.configure_optimizers = lambda: made


class Decaying(torch.optim.SGD):
    """Has a decay of its own, where there is a gradient, in one of ``every`` steps."""

    every, count = 1, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        made = super().step(closure)
        self.count += 1
        for each in (p for group in self.param_groups for p in group["params"] if p.grad is not None and p.grad.any()):
            each.mul_(0.99 if self.count % self.every == 0 else 1.0)
        return made


def decaying(every: int) -> Callable[[Run], None]:
    def put(run: Run) -> None:
        made = Decaying(run.module.parameters(), lr=0.05)
        made.every = every
        run.module.configure_optimizers = lambda: made

    return put


def late_backward(run: Run) -> None:
    """Add the mean square of the outputs to the loss in the backward pass, from the third epoch of four on."""
    kept: list[Tensor] = []
    run.module.head.register_forward_hook(lambda _, __, u: kept.append(u) if u.requires_grad else None)

    def backward(self: Any, loss: Tensor, *_: Any) -> None:
        (loss + 0.1 * kept[-1].square().mean() * (self.current_epoch >= 2)).backward()

    on("backward", backward)(run)


def noisy_targets(run: Run) -> None:
    """Draw the targets anew at every read."""

    def collate(samples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(samples)
        return x, y + torch.randn_like(y) if y.is_floating_point() else torch.randint_like(y, 2)

    run.collate = collate


PUT: dict[str, Callable[[Run], None]] = {
    "weight decay": decayed,
    "AdamW": adamw,
    "weight decay in a group": group,
    "hook on the weight": on_weight("pull"),
    "hook after the weight's gradient": on_weight("post"),
    "hook that keeps the large entries": on_weight("sparse"),
    "backward pre-hook on the head": module_hook("pre"),
    "backward hook on the trunk, head reversed": module_hook("full"),
    "backward of its own": on("backward", own_backward),
    "on_after_backward": on("on_after_backward", lambda self: change(self)),
    "on_before_optimizer_step": on("on_before_optimizer_step", lambda self, _: change(self)),
    "on_before_zero_grad that moves the head": on(
        "on_before_zero_grad", lambda self, _: self.head.weight.data.mul_(0.9)
    ),
    "optimizer_step that decays": on("optimizer_step", own_step),
    "optimizer_step that changes gradients": on("optimizer_step", normalised_step),
    "optimizer_step that clamps the head": constrained,
    "on_train_batch_end that decays": on("on_train_batch_end", lambda self, *_: self.head.weight.data.mul_(0.9)),
    "on_train_batch_start that clamps": on(
        "on_train_batch_start", lambda self, *_: self.head.weight.data.clamp_(-0.05, 0.05) is None or None
    ),
    "clipping of its own": on("configure_gradient_clipping", lambda self, *_, **__: change(self)),
    "callback after the backward": callback("on_after_backward", lambda self, trainer, net: change(net)),
    "callback before the step": callback("on_before_optimizer_step", lambda self, trainer, net, _: change(net)),
    "callback that reverses the gradient": callback(
        "on_before_optimizer_step", lambda self, trainer, net, _: change(net, -1.0, 0.0)
    ),
    "callback that decays after each batch": callback(
        "on_train_batch_end", lambda self, trainer, net, *_: net.head.weight.data.mul_(0.9)
    ),
    "callback that moves the trunk": callback(
        "on_train_batch_end", lambda self, trainer, net, *_: net.trunk[0].weight.data.mul_(0.99)
    ),
    "late change before the step": late("on_before_optimizer_step", lambda self, _: change(self)),
    "late clipping of its own": late("configure_gradient_clipping", lambda self, *_, **__: change(self)),
    "late change after the backward": late("on_after_backward", lambda self: change(self)),
    "a small pull after the backward": on("on_after_backward", lambda self: change(self, pull=1e-5)),
    "late features of another size": late_for_a_step,
    "late inputs of zero": late("on_train_batch_start", lambda self, batch, *_: batch[0].zero_() is None or None),
    "late targets of other samples": late("on_train_batch_start", lambda self, batch, *_: relabelled(batch)),
    "late skipping of the epoch": late("on_train_batch_start", lambda self, batch, batch_idx: -1),
    "clamp before the step": on("on_before_optimizer_step", clamp),
    "post hook of the optimizer": post_hook,
    "optimizer with a decay of its own": decaying(1),
    "optimizer with a decay of its own now and then": decaying(3),
    "late backward with a term of the outputs": late_backward,
    "random targets": noisy_targets,
}
# With these the guard's own steps on the head take no notice, so that what is said of them is true.
ONLY_BASE = {
    "weight decay",
    "AdamW",
    "weight decay in a group",
    "late change before the step",
    "late clipping of its own",
    "optimizer with a decay of its own",
    "optimizer with a decay of its own now and then",
}
# After the head is solved the run ends, and these do nothing any more.
BEFORE_THE_END = {
    "callback that decays after each batch",
    "callback that moves the trunk",
    "optimizer_step that decays",
    "optimizer_step that clamps the head",
    "late change after the backward",
    "late features of another size",
    "late inputs of zero",
    "late targets of other samples",
    "late skipping of the epoch",
    "clamp before the step",
    "post hook of the optimizer",
    "late backward with a term of the outputs",
}


def build(case: Case) -> Run:
    true = (case.rule != "base" and case.variant in ONLY_BASE) or (
        case.rule == "solve" and case.variant in BEFORE_THE_END
    )
    run = plain(case, claimable=true, covered=False)
    PUT[case.variant](run)
    run.epochs = 4
    return run


KIND = Kind(
    "hooks",
    list(PUT),
    lambda case: judge(case, build),
    ("rule", "loss", "precision", "batch", "n", "inputs", "spare", "classes", "seed"),
    each=3,
)
