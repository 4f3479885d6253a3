"""``find_head``: the head of a model, its last linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import is_parametrized

from lightning_conv.checked import checked
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head_probe import departure, probe_head, same
from lightning_conv.networks.inputs import Inputs, sample_count, take
from lightning_conv.networks.watched import as_rows, entering, watched_forward


@dataclass(frozen=True)
class Head:
    """Last linear layer of a model: u = W h + b."""

    name: str
    module: nn.Linear
    last: bool = True
    """Whether the layer's result is the model's result. If not, the convexity of what follows is not checked."""
    probed: bool = False
    """Whether the layer was seen to compute W h + b, at its own weights and at random ones."""
    rows: int = 1
    """Number of rows of features of a sample: T for a layer that is applied to each of T tokens."""

    @property
    def has_bias(self) -> bool:
        """Whether the bias is trained, so that the matrix of features is [h, 1] rather than h."""
        return self.module.bias is not None and self.module.bias.requires_grad

    @property
    def fixed_bias(self) -> nn.Parameter | None:
        """Bias that is added but not trained; None: there is none."""
        return None if self.has_bias else self.module.bias

    @property
    def width(self) -> int:
        """m_H, the number of last hidden features."""
        return self.module.in_features

    def trunk_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return every parameter of ``model`` that does not belong to the head, by name."""
        own = {id(p) for p in self.module.parameters()}
        return {name: p for name, p in model.named_parameters() if id(p) not in own}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return all linear layers by name, the candidates for a head."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@checked()
def find_head(model: nn.Module, inputs: Inputs, name: str | None = None, *, tokens: bool = False) -> Head:
    """Find the linear layer that produces the model's output, or the one called ``name``.

    The layer is found by a forward of two samples. The head is called once on a matrix of features h, its result is W h + b
    and the model's result, at its weights as they are and at random ones (``probe_head``): the class of a layer does not tell
    what it computes. The head must neither share its weight nor be reparametrized; otherwise the outputs would not be linear
    in the trained parameters.

    Args:
        model: any module.
        inputs: samples; the first two are used.
        name: dotted name of the layer, needed if something without parameters, such as a softmax, follows it. The result
            then has ``last=False``.
        tokens: whether the layer may have several rows of features for each sample, as in (n, T, m).

    Raises:
        ValueError: no layer was found, or ``name`` is not a linear layer, not the last layer with parameters, shared or
            reparametrized, or its output is not W h + b.

    Cost: six forwards of two samples.
    """
    layers = linear_layers(model)
    candidates = ", ".join(f'"{candidate}"' for candidate in layers) or "the model has none"
    if name is not None and name not in layers:
        raise ValueError(
            f"head: {name!r} is not an nn.Linear of the model (candidates: {candidates}); pass one of these"
        )
    nothing = (
        f"head: no nn.Linear produces the module's output (candidates: {candidates}); end the network in a call of a linear layer, such as "
        'self.head(h), or pass head="..." if only functions without parameters follow it'
    )
    few = take(inputs, slice(min(2, sample_count(inputs))))
    calls, order, result = _watch(model, few)
    made = {layer: [call for called, call in calls if called is module] for layer, module in layers.items()}
    named = name is not None
    if name is None:
        found = [layer for layer, its_calls in made.items() if len(its_calls) == 1 and same(its_calls[0][1], result)]
        matrices = [layer for layer in found if made[layer][0][0].ndim == 2]
        several = [layer for layer, its_calls in made.items() if len(its_calls) > 1 and made[layer]]
        if not found and several:
            require_one_call(several[-1], [features for features, _ in made[several[-1]]], 1, tokens=tokens)
        if not found and (scripted := scripted_part(model)):
            raise ValueError(
                f"head: no nn.Linear outside of scripted code produces the module's output, and {scripted!r} is scripted, so that its "
                "layers cannot be watched; script the trunk alone, and leave the last nn.Linear out of it"
            )
        if len(matrices or found) != 1:
            raise ValueError(nothing)
        name = (matrices or found)[0]
    head = layers[name]
    samples = sample_count(few)
    require_one_call(name, [features for features, _ in made[name]], samples, tokens=tokens)
    if order[-1] is not head:
        after = next(other for other, module in model.named_modules() if module is order[-1])
        raise ValueError(
            f'head: {name!r} is followed by "{after}", which has parameters; the head must be the last such layer'
        )
    if shared_with(model, head) is not None or is_parametrized(head):
        why = "is reparametrized" if is_parametrized(head) else "shares its weight with another layer"
        raise ValueError(
            f"head: {name!r} {why}, so the outputs are not linear in the trained parameters; end the network in a plain nn.Linear"
        )
    probe = probe_head(model, head, few)
    if probe.departs:
        raise ValueError(f"head: {name!r} {probe.departs}; end the network in a plain nn.Linear")
    if not probe.last and not named:
        raise ValueError(nothing)
    rows = len(as_rows(made[name][0][0])) // samples if tokens else 1
    return Head(name, head, last=probe.last, probed=True, rows=rows)


def head_again(model: nn.Module, inputs: Inputs, name: str) -> tuple[Head, Tensor | None]:
    """Return the head of a network whose head was ``name`` at other weights, and what enters it.

    A forward shows whether that layer is still called once, on a matrix, as the last layer with parameters, and whether
    its result is W h + b and the model's result at the weights of now. If so, what ``find_head`` saw at random weights is taken to hold
    still; otherwise it looks again.

    Args:
        model: the network, with the modules that it had.
        inputs: n samples.
        name: of the head that ``find_head`` found without being told; empty: of none.

    Returns:
        The head, and the last hidden features (n, m_H) of this forward in eval mode, in the model's own type, float32 at least; None: it
        looked again.

    Raises:
        ValueError: see ``find_head``.

    Cost: one forward.
    """
    layer = linear_layers(model).get(name)
    if layer is not None and shared_with(model, layer) is None and not is_parametrized(layer):
        calls, order, result = _watch(model, inputs)
        made = [call for called, call in calls if called is layer]
        if len(made) == 1 and order[-1] is layer and made[0][0].ndim == 2 and same(made[0][1], result):
            features, output = made[0]
            if not departure(output, features, *layer.parameters()):
                return Head(name, layer, probed=True), features
    return find_head(model, inputs), None


def scripted_part(model: nn.Module) -> str:
    """Return the name of a part of a model that is scripted or traced, and has parameters; empty: there is none.

    Args:
        model: any module.
    """
    return next(
        (n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule) and [*m.parameters()]), ""
    )


_Call = tuple[nn.Module, tuple[Tensor, Tensor]]


def _watch(model: nn.Module, inputs: Inputs) -> tuple[list[_Call], list[nn.Module], object]:
    """Run one forward and return the calls of linear layers, the layers with parameters in order of completion, and the result.

    A scripted module counts as one layer. It takes no hooks, so that a hook on all modules looks at it.
    """
    calls: list[_Call] = []
    order: list[nn.Module] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        order.append(module)
        if isinstance(module, nn.Linear):
            # A copy, because a later layer may work in place.
            calls.append((module, (entering(args, kwargs), output.detach().clone())))

    scripted = {m for m in model.modules() if isinstance(m, torch.jit.ScriptModule) and [*m.parameters()]}

    def look(module: nn.Module, args: object, output: object) -> None:
        if module in scripted:
            order.append(module)

    leaves = [m for m in model.modules() if isinstance(m, nn.Linear) or (not [*m.children()] and [*m.parameters()])]
    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in leaves if layer not in scripted]
    handles.append(register_module_forward_hook(look))
    return calls, order, watched_forward(StatelessModule(model), inputs, handles)


def require_one_call(name: str, entered: list[Tensor], samples: int, *, tokens: bool) -> None:
    """Refuse a layer that is not called once, with as many rows of features for each sample.

    Args:
        name: of the layer, for the message.
        entered: What has entered it, call by call.
        samples: Number of samples.
        tokens: Whether a sample may have several rows.

    Raises:
        ValueError: It was called more than once, not at all, or on another shape.
    """
    shapes = [tuple(tensor.shape) for tensor in entered]
    if len(entered) != 1:
        raise ValueError(
            f"head: {name!r} was called {len(entered)} times with {shapes}; need one call on a matrix of features, (n, m_H): call it "
            "once, on torch.stack([...], 1) of what enters it"
        )
    if entered[0].ndim != 2 and not tokens:
        raise ValueError(f"head: {name!r} was called on {shapes[0]}; need one call on a matrix of features, (n, m_H)")
    if tokens and (entered[0].ndim < 2 or len(as_rows(entered[0])) % samples):
        raise ValueError(
            f"head: {name!r} was called on {shapes[0]} for {samples} samples; need as many rows of features for each sample"
        )


def shared_with(model: nn.Module, layer: nn.Module) -> str | None:
    """Return the name of a module that shares a parameter with ``layer``, or None.

    The name is the layer's own if it holds the same parameter twice.

    Args:
        model: the network.
        layer: module of ``model`` whose parameters are looked for elsewhere.
    """
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    places = [
        name
        for module, name in names.items()
        for parameter in module._parameters.values()
        if parameter is not None and id(parameter) in own
    ]
    elsewhere = next((name for name in places if name != names[layer]), None)
    return names[layer] if elsewhere is None and len(places) > len(own) else elsewhere
