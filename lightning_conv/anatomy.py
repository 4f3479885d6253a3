"""Read a model: its last linear layer (the head) and the features that enter it (the trunk's output)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_conv.evaluation import Inputs, StatelessModule, map_inputs, sample_count, undisturbed


@dataclass(frozen=True)
class Head:
    """The last linear layer of a model: u = W h + b."""

    name: str
    module: nn.Linear

    @property
    def width(self) -> int:
        """m_H, the number of last hidden features."""
        return self.module.in_features

    def trunk_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Every parameter of ``model`` that is not the head's, by name."""
        own = {id(p) for p in self.module.parameters()}
        return {name: p for name, p in model.named_parameters() if id(p) not in own}


class CalledBy(nn.Module):
    """``forward_fn(module, inputs)`` as a module, so that custom calls go through the same machinery."""

    def __init__(self, module: nn.Module, forward_fn: object) -> None:
        super().__init__()
        self.module = module
        self._forward_fn = forward_fn

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Call the function on the module and the inputs as they were given (tensor, tuple or mapping)."""
        inputs = kwargs or (args[0] if len(args) == 1 else args)
        result: Tensor = self._forward_fn(self.module, inputs)  # type: ignore[operator]
        return result


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by name: the candidates for a head."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def find_head(model: nn.Module, inputs: Inputs, name: str | None = None) -> Head:
    """The linear layer that produces the model's output, or the one called ``name``.

    The layer is found by running two samples: the head is the linear layer, called once on a matrix of features, whose
    result is the model's result.

    Args:
        model: any module.
        inputs: samples; the first two are used.
        name: dotted name of the layer when it cannot be found, e.g. because a softmax follows it.

    Raises:
        ValueError: ``name`` is no linear layer, or none was found; both list the candidates.
    """
    layers = linear_layers(model)
    candidates = ", ".join(f'"{candidate}"' for candidate in layers) or "the model has none"
    if name is not None and name not in layers:
        raise ValueError(
            f"head: {name!r} is not an nn.Linear of the model (candidates: {candidates}); pass one of these"
        )
    few = map_inputs(lambda tensor: tensor[: min(2, sample_count(inputs))], inputs)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def recorder(layer: str) -> object:
        def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            calls[layer].append((_entering(args, kwargs), output.detach()))

        return record

    handles = [
        module.register_forward_hook(recorder(layer), with_kwargs=True)  # type: ignore[arg-type]
        for layer, module in layers.items()
    ]
    try:
        with undisturbed(model), torch.no_grad():
            module = StatelessModule(model)
            result = module.call({}, module.convert(few))
    finally:
        for handle in handles:
            handle.remove()
    if name is not None:
        _require_usable(name, calls[name])
        return Head(name, layers[name])
    found = [
        layer
        for layer, made in calls.items()
        if len(made) == 1 and made[0][0].ndim == 2 and isinstance(result, Tensor) and _same(made[0][1], result)
    ]
    if len(found) != 1 or _is_shared(model, layers[found[0]]):
        why = "its weight is shared with another layer" if found else "no nn.Linear produces the module's output"
        raise ValueError(
            f'head: {why} (candidates: {candidates}); pass head="..." or end the network in a linear layer'
        )
    return Head(found[0], layers[found[0]])


def last_hidden_features(model: nn.Module, head: Head, inputs: Inputs, *, dtype: torch.dtype | None = None) -> Tensor:
    """h = what enters the head, shape (n, m_H), in eval mode; ``dtype=torch.float64`` computes it from a float64 copy of the model.

    Raises:
        ValueError: the forward does not call the head exactly once.
    """
    entered: list[Tensor] = []
    handle = head.module.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(_entering(args, kwargs)), with_kwargs=True
    )
    try:
        with undisturbed(model), torch.no_grad():
            module = StatelessModule(model, dtype=dtype)
            module.call({}, module.convert(inputs))
    finally:
        handle.remove()
    if len(entered) != 1 or entered[0].ndim != 2:
        shapes = [tuple(tensor.shape) for tensor in entered]
        raise ValueError(
            f"head: {head.name!r} was called {len(entered)} times with {shapes}; need one call on (n, m_H) features"
        )
    return entered[0]


def _entering(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """What a linear layer was called on: ``layer(h)`` or ``layer(input=h)``."""
    return (args[0] if args else kwargs["input"]).detach()


def _require_usable(name: str, made: list[tuple[Tensor, Tensor]]) -> None:
    if len(made) != 1 or made[0][0].ndim != 2:
        shapes = [tuple(inputs.shape) for inputs, _ in made]
        raise ValueError(
            f"head: {name!r} was called {len(made)} times with {shapes}; need one call on a matrix of features"
        )


def _same(output: Tensor, result: Tensor) -> bool:
    if output.numel() != result.numel():
        return False
    # A diverged network has a head too.
    return torch.allclose(output.flatten(), result.detach().flatten(), rtol=0, atol=0, equal_nan=True)


def _is_shared(model: nn.Module, head: nn.Linear) -> bool:
    uses = sum(parameter is head.weight for module in model.modules() for parameter in module.parameters(recurse=False))
    return uses > 1
