"""``LayerRule``: how derivatives by a layer's parameters follow from its arguments.

``register_rule`` assigns one to a function.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

Arguments: TypeAlias = Mapping[str, Any]  # arguments of one call by name, with detached tensors


class LayerRule(ABC):
    """How the derivatives by the parameters of one kind of layer follow from its arguments and its output gradients B.

    A rule is written for a function of torch such as ``F.linear``, not for a module class. It applies to every module
    and every forward that calls the function with the parameter itself. To add a rule, subclass ``LayerRule`` and call
    ``register_rule(function, rule)``. On each network the result of a rule is first compared with the gradient of
    autograd, so a wrong rule is never used.

    Shapes: every tensor with samples has the N samples along dimension 0; there are K outputs.
    """

    signature: ClassVar[str]  # names of the function's arguments in order, such as "input weight bias"
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")  # the arguments that may be parameters
    rewrites: ClassVar[bool] = False  # whether ``call`` is used even if no parameter is tracked

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        return dict(zip(self.signature.split(), args, strict=False)) | dict(kwargs)

    def holds(self, arguments: Arguments) -> bool:
        """Return whether the rule covers this call; if not, its parameters belong to the general engine."""
        del arguments
        return True

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """Compute the output of the layer; override it where another way to the same numbers differentiates faster."""
        return function(**arguments)

    def sampled(self, arguments: Arguments, output: Tensor) -> dict[str, Tensor]:
        """Return the arguments that ``rows`` needs and that have one row per sample, like the output."""
        del output
        return {"input": arguments["input"]}

    def prepare(self, arguments: Arguments) -> Arguments:
        """Add to the arguments what ``rows`` needs and what does not depend on B; computed once for all outputs."""
        return arguments

    @abstractmethod
    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """Compute the per-sample derivatives by one parameter.

        Args:
            arguments: arguments of the call as ``prepare`` returned them, with samples along dimension 0.
            slot: name of the argument that is the parameter.
            gradients: B, (N, K, *output).

        Returns:
            The derivatives du_ik / d(parameter) of output k of sample i, (N, K, *parameter).
        """


class OuterRule(LayerRule):
    r"""A rule for a weight whose derivative is a sum of outer products over positions r (pixels, sequence steps).

    .. math:: \partial u_{ik} / \partial W_g = \sum_r b_{ikrg} \, a_{irg}^T \quad \text{(groups g)}

    so that the kernel follows from A (rows a_irg) and B (rows b_ikrg) without forming the derivative.
    """

    bias_is_constant_input: ClassVar[bool] = True
    """Whether the bias acts like a weight on a constant input of 1, so that its B is the B of the weight."""

    @abstractmethod
    def factor_inputs(self, arguments: Arguments) -> Tensor:
        """Return A, (N, R, groups, in)."""

    @abstractmethod
    def factor_gradients(self, arguments: Arguments, gradients: Tensor) -> Tensor:
        """Return B of one output, (N, R, groups, out), from its gradients (N, *output)."""

    @abstractmethod
    def to_parameter(self, arguments: Arguments, outer: Tensor) -> Tensor:
        """Rearrange (..., groups, out, in) like the weight: (..., *weight)."""

    @abstractmethod
    def bias_rows(self, gradients: Tensor) -> Tensor:
        """Return the derivatives by the bias, (N, K, out), from the gradients (N, K, *output)."""

    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """See ``LayerRule.rows``."""
        if slot == "bias":
            return self.bias_rows(gradients)
        inputs = self.factor_inputs(arguments).transpose(1, 2)  # (N, g, R, in)
        outer = [
            self.factor_gradients(arguments, gradients[:, k]).permute(0, 2, 3, 1) @ inputs
            for k in range(gradients.shape[1])
        ]
        return self.to_parameter(arguments, torch.stack(outer, 1))


_RULES: dict[Callable[..., Any], LayerRule] = {}


def register_rule(function: Callable[..., Any], rule: LayerRule) -> None:
    """Make ``rule`` the rule of ``function``, from now on and in this process.

    Args:
        function: a function that torch dispatches: from ``torch.nn.functional``, from ``torch``, or one of your own
            that is made dispatchable by ``torch.overrides.wrap_torch_function``.
        rule: an instance that says how its derivatives are formed.

    Raises:
        TypeError: ``rule`` is a class, or not a rule.

    Example:
        >>> import torch
        >>> class ScaleRule(LayerRule):  # u = x * scale, written as a function of its own
        ...     signature = "input scale"
        ...     parameters = ("scale",)
        ...
        ...     def rows(self, arguments, slot, gradients):
        ...         return gradients * arguments["input"][:, None]
        >>> scale = torch.overrides.wrap_torch_function(lambda x, s: (x, s))(lambda x, s: x * s)
        >>> register_rule(scale, ScaleRule())
        >>> type(rule_of(scale)).__name__
        'ScaleRule'
    """
    if not isinstance(rule, LayerRule):
        what = (
            f"the class {rule.__name__}; pass an instance" if inspect.isclass(rule) else f"{rule!r}; pass a LayerRule"
        )
        raise TypeError(f"rule: got {what}")
    _RULES[function] = rule


def rule_of(function: Callable[..., Any]) -> LayerRule | None:
    """Return the rule that is registered for ``function``, or None."""
    return _RULES.get(function)
