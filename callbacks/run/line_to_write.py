"""``line_to_write``: the line that says how a network is called, tried on a copy of the module before it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.observe_run import copy_of
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.losses.torch_loss import is_loss_module
from lightning_conv.networks.inputs import sample_count, take
from lightning_conv.networks.observed.leaves import Place, at
from lightning_conv.networks.undisturbed import undisturbed

Inputs: TypeAlias = tuple[str, Any]
"""How the inputs are taken out of ``batch``, in Python, and what comes of it."""

Call: TypeAlias = tuple[str, Callable[[nn.Module, Any], Any]]
"""How ``module`` is called on ``x``, in Python and as a function."""


def line_to_write(trainer: pl.Trainer, callback: str, probe: Probe, batch: Any, places: Sequence[Place]) -> str:
    """Return what to write where a network cannot be measured: a call of the module that was tried, if one works.

    Args:
        trainer: Trainer of the run.
        callback: Name of the callback.
        probe: Its settings.
        batch: A batch.
        places: Those of its tensors that have a row for each sample.
    """
    without = without_measuring(callback)
    with isolated(), attempted(Exception) as copying:
        module = copy_of(trainer, trainer.lightning_module).module
    if copying.failed:  # no other call of it could be measured either
        return without
    given = probe.inputs is not None
    inputs = [("...", probe.inputs)] if given else list(inputs_of(batch, places))
    for (taken, _), (written, _) in working_calls(module, inputs):
        first = f"inputs={taken}" if given else f"input_fn=lambda batch: {taken}"
        line = f"{callback}(probe=Probe({first}, forward_fn=lambda module, x: {written}))"
        return f"say how it is called, in this way: {line}; {without}"
    line = f"{callback}(probe=Probe(inputs=..., forward_fn=lambda module, x: ...))"
    return f"give samples of one shape, and say how the network is called on all of them: {line}; {without}"


def without_measuring(callback: str) -> str:
    """Return how to train a run that cannot be measured.

    Args:
        callback: Name of the callback.
    """
    return f'{callback}(on_error="warn") trains without measuring'


def working_calls(module: nn.Module, inputs: Sequence[Inputs]) -> Iterator[tuple[Inputs, Call]]:
    """Yield calls of a module, and of its parts one after the other, that give outputs with a row for each sample and a gradient.

    Args:
        module: A copy of the run's module.
        inputs: What it may be called on, see ``inputs_of``.
    """
    itself = [(each, _of_itself(several=isinstance(each[1], tuple))) for each in inputs]
    parts = [(each, call) for each in inputs for call in _of_parts(module) if not isinstance(each[1], tuple)]
    for (taken, x), (written, call) in (*itself, *parts):
        if _works(module, call, x):
            yield (taken, x), (written, call)


def inputs_of(batch: Any, places: Sequence[Place]) -> Iterator[Inputs]:
    """Yield the tensors of a batch that have a row for each sample, floating ones first, and then all but the last together.

    Args:
        batch: A batch.
        places: Of these tensors.
    """
    found = [(_in_python(batch, place), at(batch, place)) for place in places]
    yield from sorted(found, key=lambda each: not each[1].is_floating_point())
    if len(found) > 2:
        yield f"({', '.join(taken for taken, _ in found[:-1])})", tuple(each for _, each in found[:-1])


def _in_python(batch: Any, place: Place) -> str:
    """Return how the tensor at a place of the batch is written."""
    written = "batch"
    for depth, key in enumerate(place):
        holder = at(batch, place[:depth])
        written += f"[{key!r}]" if isinstance(holder, (Mapping, list, tuple)) else f".{key}"
    return written


def _of_itself(*, several: bool) -> Call:
    return ("module(*x)", lambda model, x: model(*x)) if several else ("module(x)", lambda model, x: model(x))


def _of_parts(module: nn.Module) -> Iterator[Call]:
    """Yield calls of the parts of a module: one after the other, and each of them."""
    names = [
        name
        for name, part in module.named_children()
        if any(True for _ in part.parameters()) and not is_loss_module(part)
    ]
    for some in (names, *([name] for name in reversed(names))):
        if some:
            yield _chained(some), _chain(some)


def _chained(names: Sequence[str]) -> str:
    written = "x"
    for name in names:
        written = f"module.{name}({written})"
    return written


def _chain(names: Sequence[str]) -> Callable[[nn.Module, Any], Any]:
    def call(model: nn.Module, x: Any) -> Any:
        for name in names:
            x = model.get_submodule(name)(x)
        return x

    return call


def _works(module: nn.Module, call: Callable[[nn.Module, Any], Any], x: Any) -> bool:
    """Return whether a call gives finite outputs with a row for each sample, which is its own, and a gradient.

    One sample alone has no kernel.
    """
    if sample_count(x) < 2:
        return False
    with isolated(), undisturbed(module), torch.enable_grad(), attempted(Exception) as attempt:
        made, alone = call(module, x), call(module, take(x, slice(1)))
    if attempt.failed or not isinstance(made, Tensor) or not made.requires_grad:
        return False
    if not made.is_floating_point() or made.ndim == 0 or len(made) != sample_count(x) or not made.isfinite().all():
        return False
    first = made[0].detach().flatten()
    return first.numel() == alone.numel() and torch.allclose(
        first, alone.detach().flatten(), rtol=1e-3, atol=1e-4 * float(made.detach().abs().max())
    )
