"""``StepCall``: the training step as a function of the outputs of one layer, observed on a copy of the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.networks.observed.leaves import Place, at, with_tensors
from lightning_conv.networks.watched import as_rows, entering


class NotAFunctionError(RuntimeError):
    """The training step does not call the layer once, or gives no loss; the message says which."""


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled, by ``torch.compile(module)`` or ``module.compile()``.

    Args:
        module: Any module.
    """
    marks = ("_compiler_ctx", "_compiled_call_impl")
    return hasattr(module, "_orig_mod") or any(getattr(module, mark, None) is not None for mark in marks)


@dataclass(frozen=True)
class Seen:
    """One training step, as it was observed."""

    loss: Tensor  # with its graph
    outputs: Tensor  # u, the result of the layer, in the graph of the loss
    entered: tuple[tuple[Any, ...], Mapping[str, Any]]  # what the layer was called with

    @property
    def features(self) -> Tensor:
        """What enters the layer, as a matrix h with a row for each call of W h + b: (n, m), or (n T, m) for T tokens."""
        return as_rows(entering(*self.entered))


@dataclass(frozen=True)
class StepCall:
    """Runs the training step on one batch: u -> loss, where u stands for the result of a layer in its call with gradients.

    Args:
        twin: Copy of the module.
        name: Dotted name of the layer in the LightningModule; empty: the LightningModule itself.
        batch: A batch, as the training step gets it.
        batch_idx: Its number in the epoch.
        place: Where u stands in the layer's result; empty: u is the result.
    """

    twin: Twin
    name: str
    batch: Any
    batch_idx: int = 0
    place: Place = ()

    def __call__(self, outputs: Tensor) -> Tensor:
        """Return the loss if the layer returned these outputs, with its graph.

        The forward of everything else runs as it does in the training step.

        Args:
            outputs: u, in shape and type of the layer's result.

        Raises:
            NotAFunctionError: The step does not call the layer exactly once, or gives no loss.
        """
        return self.observe(outputs).loss

    def observe(self, instead: Tensor | None = None) -> Seen:
        """Run the step once.

        Args:
            instead: Outputs that take the place of the layer's; None: its own.

        Raises:
            NotAFunctionError: See ``__call__``.
        """
        calls: list[tuple[tuple[tuple[Any, ...], Mapping[str, Any]], Tensor]] = []
        # The step itself may differentiate by the outputs.
        held = instead if instead is None or instead.requires_grad else instead.detach().requires_grad_()

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():  # an accuracy, say: it adds nothing to the gradient
                return output
            made = at(output, self.place) if held is None else held
            calls.append(((args, dict(kwargs)), made))
            cloned = made.clone()  # what follows may work in place
            return with_tensors(output, lambda place, tensor: cloned if place == self.place else tensor)

        layer = self.twin.module.get_submodule(self.name)
        hook = layer.register_forward_hook(look, with_kwargs=True)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                loss = self.twin.step(self.batch, self.batch_idx)
        finally:
            hook.remove()
        if len(calls) != 1:
            raise NotAFunctionError(
                f"the training step calls {self.name!r} {len(calls)} times{self._compiled(len(calls))}"
            )
        if loss is None or loss.numel() != 1:
            raise NotAFunctionError("the training step returns no loss")
        entered, outputs = calls[0]
        return Seen(loss.reshape(()), outputs, entered)

    def _compiled(self, calls: int) -> str:
        """Return what to do about a layer in compiled code, which calls no hooks; empty if it is in none."""
        parts = self.name.split(".")
        inside = (self.twin.module.get_submodule(".".join(parts[:k])) for k in range(len(parts) + 1))
        if calls or not any(is_compiled(each) for each in inside):
            return ""
        return ": it is in compiled code; compile the rest without it, as in self.trunk = torch.compile(self.trunk)"
