"""``PassCost``: the cost of a pass through the network where no layer rule tells it; ``count_pass`` measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_conv.machine.clock import now
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs


@dataclass(frozen=True)
class PassCost:
    """Cost of one forward, and of one backward for one combination of outputs, on the samples that were counted."""

    forward: float  # flops
    backward: float  # flops
    backward_seconds: float


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the flops of matrix products, convolutions and attention with the formulas of torch."""

    # Not ``FlopCounterMode``, which has the same formulas: its module tracker takes a second to load.
    supports_higher_order_operators = True  # flex attention, whose inside is not counted

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count_pass(module: StatelessModule, names: Sequence[str], inputs: Inputs) -> PassCost:
    """Count the flops of a forward and of a backward for the parameters ``names``, and time the backward.

    A multiplication and an addition count as two flops. Elementwise work and fused recurrent layers are not counted.
    Call it inside ``undisturbed(module.model)``.

    Cost: two forwards and two backwards of ``inputs``.
    """
    leaves = {name: module.parameters[name].detach().requires_grad_() for name in names}

    def back(outputs: torch.Tensor) -> None:
        if outputs.requires_grad:
            torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)

    outputs = module.outputs(leaves, inputs)
    start = now(module.device)
    back(outputs)
    seconds = now(module.device) - start
    with _Counter() as counter:
        outputs = module.outputs(leaves, inputs)
        forward = counter.flops
        back(outputs)
    return PassCost(forward, counter.flops - forward, seconds)
