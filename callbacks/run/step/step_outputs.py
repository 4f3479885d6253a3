"""``StepOutputs``: the training step as a function of the network's outputs, whatever calls they come from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.call import NotAFunctionError
from lightning_conv.callbacks.run.twin import Twin
from lightning_conv.networks.observed.leaves import at, tensors_in, with_part, with_tensors
from lightning_conv.networks.observed.replay import OutputPlace


@dataclass(frozen=True)
class StepOutputs:
    """Runs the training step on one batch: u -> loss, where u, (n, ...), stands for what some calls return.

    Args:
        twin: Copy of the module.
        batch: A batch, as the training step gets it.
        places: Where the outputs are made; of several, u is (n, C), each flattened, side by side, as ``Replay`` returns them.
        samples: Number n of samples in the batch.
        batch_idx: Its number in the epoch.
        instead: What the calls return, each with one tensor in it, for any number of samples; with it the calls are left out, see
            ``without_calls``.
    """

    twin: Twin
    batch: Any
    places: tuple[OutputPlace, ...]
    samples: int
    batch_idx: int = 0
    instead: tuple[Any, ...] = ()

    def __call__(self, outputs: Tensor) -> Tensor:
        """Return the loss for these outputs, with its graph; everything else runs as it does in the training step.

        Args:
            outputs: u; each part is given in the type of what it stands for.

        Raises:
            NotAFunctionError: The step does not make the calls, or gives no loss.
        """
        held = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
        if len(self.places) > 1:
            _ = self.seen  # the sizes of the parts, which a hook must not look for while the step runs
        return self._run(held)[0]

    @cached_property
    def seen(self) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
        """The loss of the step as it is, with its graph, the outputs as the calls return them, and all that the calls return.

        Raises:
            NotAFunctionError: See ``__call__``.
        """
        return self._run(None)

    def without_calls(self) -> StepOutputs:
        """Return the same function, which leaves the calls out where u is all that they return: a forward of the network less each time.

        What else a call does, such as keeping activations for the loss, is left out, too: whether that matters has to be compared.
        """
        returned = self.seen[2]
        if any(place.several or place.padded for place in self.places) or any(_tensors(each) != 1 for each in returned):
            return self
        without_graph = tuple(with_tensors(each, lambda _, tensor: tensor.detach()) for each in returned)
        quick = replace(self, instead=without_graph)
        vars(quick)["seen"] = self.seen
        return quick

    @property
    def present(self) -> Tensor:
        """u as the step makes it, without a graph."""
        natives = self.seen[1]
        rows = [place.rows(each.detach(), self.samples) for place, each in zip(self.places, natives, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat([each.flatten(1) for each in rows], 1)

    @property
    def classes(self) -> int:
        """Length of the last axis of the one output where its samples are in front; 0: there is not one."""
        (place, *more), (native, *_) = self.places, self.seen[1]
        if more or native.ndim < 2 or (place.axis if native.ndim == place.ndim else 0) == native.ndim - 1:
            return 0
        return native.shape[-1]

    def _run(self, outputs: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
        natives: dict[int, Tensor] = {}
        returned: dict[int, Any] = {}
        counts: Counter[str] = Counter()

        def replaced(name: str) -> Callable[[nn.Module, Any, Any], Any]:
            def see(_: nn.Module, __: Any, output: Any) -> Any:
                number, made = counts[name], {}
                counts[name] += 1
                for k, place in enumerate(self.places):
                    if (place.name, place.number) == (name, number):
                        natives[k], returned[k] = at(output, place.place), output
                        made[place.place] = natives[k] if outputs is None else self._native(outputs, k, natives[k])
                if outputs is None or not made:
                    return None
                return with_tensors(output, lambda where, tensor: made.get(where, tensor))

            return see

        def left_out(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def made(*args: Any, **kwargs: Any) -> Any:
                number = counts[name]
                counts[name] += 1
                for k, place in enumerate(self.places):
                    if outputs is not None and (place.name, place.number) == (name, number):
                        natives[k] = self._native(outputs, k, at(self.instead[k], place.place))
                        returned[k] = with_part(self.instead[k], place.place, natives[k])
                        return returned[k]
                return forward(*args, **kwargs)

            return made

        with ExitStack() as changes:
            for name in dict.fromkeys(each.name for each in self.places):
                module = self.twin.module.get_submodule(name)
                if outputs is None or not self.instead:
                    changes.callback(module.register_forward_hook(replaced(name)).remove)
                else:
                    changes.enter_context(own_forward(module, left_out(name, module.forward)))
            with torch.inference_mode(False), torch.enable_grad():
                loss = self.twin.step(self.batch, self.batch_idx)
        if len(natives) != len(self.places):
            names = ", ".join(repr(each.name) if each.name else "the module" for each in self.places)
            raise NotAFunctionError(f"the training step does not call {names} as it did when it was observed")
        if loss is None or loss.numel() != 1:
            raise NotAFunctionError("the training step returns no loss")
        numbers = range(len(self.places))
        return loss.reshape(()), tuple(natives[k] for k in numbers), tuple(returned[k] for k in numbers)

    def _native(self, outputs: Tensor, number: int, like: Tensor) -> Tensor:
        """Return one of the parts of u in the layout, the type and the place of what it stands for, which may have other samples."""
        part = outputs
        if len(self.places) > 1:
            sizes = [each.numel() // self.samples for each in self.seen[1]]
            part = torch.split(outputs.reshape(len(outputs), -1), sizes, 1)[number]
        place = self.places[number]
        along = place.axis if like.ndim == place.ndim else 0
        moved = list(like.movedim(along, 0).shape)
        if self.instead:
            moved[0] = len(outputs)
        if part.numel() != math.prod(moved):
            raise NotAFunctionError(
                f"outputs of shape {tuple(outputs.shape)} do not fit the layer's {tuple(like.shape)}"
            )
        # A clone: what follows may work in place.
        return part.reshape(moved).movedim(0, along).to(like.device, like.dtype).clone()


def _tensors(structure: Any) -> int:
    return sum(1 for _ in tensors_in(structure))


@contextmanager
def own_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another ``forward`` for a while.

    Args:
        module: Any module.
        forward: What it is to call.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before
