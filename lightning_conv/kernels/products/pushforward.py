"""``Push``: J W, the derivatives of a batch's outputs along directions in parameter space; ``choose_push`` finds how.

Forward mode is used if the network supports it, and a double backward otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.func import jvp, vmap

from lightning_conv.kernels.products.embedding_watch import EmbeddingWatch
from lightning_conv.kernels.products.pullback import Pullback
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs

Directions: TypeAlias = Mapping[str, Tensor]
PushMethod: TypeAlias = Literal["forward mode", "double backward"]

PADDED = "an embedding has a padding_idx, whose row has no gradient, and forward mode does not leave it out"


@dataclass(frozen=True)
class Push:
    """The way in which J w is computed for a network."""

    method: PushMethod
    reason: str | None  # why forward mode is not used
    vectorises: bool  # whether several directions can go through one pass

    def __call__(self, module: StatelessModule, inputs: Inputs, directions: Directions, *, batched: bool) -> Tensor:
        """Return the derivatives (b, n, C) along ``directions``, which has (b, *shape) for each parameter."""
        if self.method == "double backward":
            return push_by_double_backward(module, inputs, directions)
        return push_forward(module, inputs, directions, batched=batched and self.vectorises)


def push_forward(module: StatelessModule, inputs: Inputs, directions: Directions, *, batched: bool) -> Tensor:
    """Compute J W in forward mode.

    Raises:
        RuntimeError: an operator of the network has no forward derivative or, if ``batched``, is not supported by vmap.

    Cost: about two forwards per direction; no graph is kept.
    """
    point = {name: module.parameters[name] for name in directions}

    def along(direction: Directions) -> Tensor:
        derivative: Tensor = jvp(lambda parameters: module.outputs(parameters, inputs), (point,), (direction,))[1]
        return derivative.detach()

    if batched:
        together: Tensor = vmap(along)(dict(directions))
        return together
    return torch.stack([along(direction) for direction in _one_by_one(directions)])


def push_by_double_backward(module: StatelessModule, inputs: Inputs, directions: Directions) -> Tensor:
    """Compute J W by two backwards: g(u) = J^T u is linear in u, and J w is the gradient of <g(u), w> by u.

    Raises:
        RuntimeError: the backward of an operator cannot be differentiated.

    Cost: a forward, a backward, and about two backwards per direction, while the graphs of both are kept.
    """
    # The backward of cuDNN's recurrent layers cannot be differentiated; that of the plain kernels can.
    on_gpu = module.device.type == "cuda"
    plain: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False) if on_gpu else nullcontext()
    with plain:
        leaves = {name: module.parameters[name].detach().requires_grad_() for name in directions}
        outputs = module.outputs(leaves, inputs)
        count = len(next(iter(directions.values())))
        nothing = outputs.new_zeros(count, *outputs.shape)
        if not outputs.requires_grad:
            return nothing
        dummy = torch.zeros_like(outputs).requires_grad_()
        pulled = torch.autograd.grad(outputs, list(leaves.values()), dummy, create_graph=True, allow_unused=True)
        linear = {n: g for n, g in zip(leaves, pulled, strict=True) if g is not None and g.requires_grad}
        if not linear:
            return nothing
        return torch.stack(
            [
                torch.autograd.grad(list(linear.values()), dummy, [w[n] for n in linear], retain_graph=True)[0]
                for w in _one_by_one(directions)
            ]
        )


def choose_push(module: StatelessModule, names: Sequence[str], inputs: Inputs) -> Push:
    """Choose forward mode if it is the transpose of the backward on ``inputs``, and the double backward otherwise.

    The two can differ, since a hook on a tensor or a custom backward changes gradients but not forward derivatives. The
    kernel is defined by the backward, whose gradients train the network.

    Raises:
        RuntimeError: neither works; the message contains both reasons. An embedding scales its gradients by the frequency of words.
        OutOfMemoryError: the device is out of memory.

    Cost: a backward and a few forwards over ``inputs``.
    """
    generator = torch.Generator().manual_seed(0)
    with EmbeddingWatch() as watch:
        pullback = Pullback(module, names, inputs, batched=False)
    if watch.by_frequency:
        raise RuntimeError(
            "model: an embedding has scale_grad_by_freq=True, so that its gradient is none of the outputs and depends on the batch; "
            "use ntk_gram, which takes it sample by sample, or scale_grad_by_freq=False"
        )
    left = torch.randn(1, *pullback.outputs.shape, generator=generator).to(pullback.outputs)
    directions = {n: torch.randn(2, *p.shape, generator=generator).to(p) for n, p in pullback.leaves.items()}
    single = {name: w[:1] for name, w in directions.items()}
    gradient = pullback(left)
    tolerance = torch.finfo(module.dtype).eps ** 0.5

    def refuted(method: Callable[[], Tensor]) -> str | None:
        try:
            image = method()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        return _disagreement(left, image, gradient, single, tolerance)

    with warnings.catch_warnings():
        # The rules of torch for forward mode compile themselves on first use with a function that torch has deprecated.
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        # ``inputs`` are a few samples, and the padding may be in others.
        reason = PADDED if watch.padded else refuted(lambda: push_forward(module, inputs, single, batched=False))
    if reason is None:
        return Push("forward mode", None, _vectorises(module, inputs, directions))
    # A backward that can be differentiated only once is silently missing from the second one, so this is checked, too.
    second = refuted(lambda: push_by_double_backward(module, inputs, single))
    if second is None:
        return Push("double backward", reason, vectorises=False)
    raise RuntimeError(
        f"model: J w can be computed neither in forward mode ({reason}) nor by a double backward ({second}); use ntk_gram, "
        "which needs first derivatives only"
    )


def _vectorises(module: StatelessModule, inputs: Inputs, directions: Directions) -> bool:
    try:
        push_forward(module, inputs, directions, batched=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def _disagreement(
    left: Tensor, image: Tensor, gradient: Directions, direction: Directions, tolerance: float
) -> str | None:
    """Return None if <u, J w> = <J^T u, w> up to rounding, and otherwise both numbers in words."""
    pushed = float((image.double() * left.double()).sum())
    pulled = sum(float((gradient[name].double() * w.double()).sum()) for name, w in direction.items())
    scale = float(image.double().norm() * left.double().norm())
    scale += sum(float(gradient[name].double().norm() * w.double().norm()) for name, w in direction.items())
    if abs(pushed - pulled) <= tolerance * scale:
        return None
    return f"it gives <u, J w> = {pushed:.6g} where the backward gives <J^T u, w> = {pulled:.6g}"


def _one_by_one(directions: Directions) -> Iterator[dict[str, Tensor]]:
    for k in range(len(next(iter(directions.values())))):
        yield {name: direction[k] for name, direction in directions.items()}
