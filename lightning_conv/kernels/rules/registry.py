"""The registry: which function of torch has a layer rule, and what a rule has to say."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

Arguments: TypeAlias = Mapping[str, Any]  # of one call, by name; tensors detached


class LayerRule(ABC):
    """How the derivatives by the parameters of one kind of layer follow from its arguments and its output gradients B.

    A rule is written for a function of torch (``F.linear``), not for a module class: it holds for every module and every
    forward that calls the function with the parameter itself. Subclass it, then ``register_rule(function, rule)``.
    Before a rule is used on a network, its result is compared with autograd's gradient there, so a wrong rule is never
    believed.

    Shapes: N samples along dimension 0 of every tensor with samples, K outputs.
    """

    signature: ClassVar[str]  # names of the function's arguments, in order: "input weight bias"
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")  # those of them that may be parameters
    rewrites: ClassVar[bool] = False  # whether ``call`` is to be used even where no parameter is tracked

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self.signature.split(), args, strict=False)) | dict(kwargs)

    def holds(self, arguments: Arguments) -> bool:
        """Whether the rule covers this call; otherwise its parameters take the general way."""
        del arguments
        return True

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        """The layer's output; override where the same numbers can be had in a way that differentiates faster."""
        return function(**arguments)

    def sampled(self, arguments: Arguments, output: Tensor) -> dict[str, Tensor]:
        """The arguments that ``rows`` needs and that have one row a sample, with the output's leading dimensions."""
        del output
        return {"input": arguments["input"]}

    def prepare(self, arguments: Arguments) -> Arguments:
        """What ``rows`` needs and does not depend on the gradients, computed once for all outputs."""
        return arguments

    @abstractmethod
    def rows(self, arguments: Arguments, slot: str, gradients: Tensor) -> Tensor:
        """Per-sample derivatives of one parameter.

        Args:
            arguments: of the call, tensors with samples along dimension 0, as ``prepare`` returned them.
            slot: which parameter, by the name of the argument.
            gradients: B, shape (N, K, *output).

        Returns:
            (N, K, *parameter), element (i, k) being du_ik / d(parameter).
        """


class OuterRule(LayerRule):
    r"""A rule for a weight whose derivative is a sum of outer products over positions r (pixels, sequence steps).

    .. math:: \partial u_{ik} / \partial W_g = \sum_r b_{ikrg} \, a_{irg}^T \quad \text{(groups g)}

    so that the kernel can be had from A and B without forming the derivative.
    """

    bias_is_constant_input: ClassVar[bool] = True
    """The bias acts like a weight on an input that is always one: its B is the weight's B."""

    @abstractmethod
    def factor_inputs(self, arguments: Arguments) -> Tensor:
        """A: (N, R, groups, in)."""

    @abstractmethod
    def factor_gradients(self, arguments: Arguments, gradients: Tensor) -> Tensor:
        """B: (N, R, groups, out) of one output, from the gradients (N, *output)."""

    @abstractmethod
    def to_parameter(self, arguments: Arguments, outer: Tensor) -> Tensor:
        """(..., groups, out, in) arranged as the weight: (..., *weight)."""

    @abstractmethod
    def bias_rows(self, gradients: Tensor) -> Tensor:
        """(N, K, out) from the gradients (N, K, *output)."""

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
    """Make ``rule`` the rule of ``function`` from now on, in this process.

    Args:
        function: a function that torch dispatches (``torch.nn.functional``, ``torch``, or your own, made dispatchable by
            ``torch.overrides.wrap_torch_function``).
        rule: how its derivatives are formed.

    Raises:
        TypeError: ``rule`` is a class or something else than a rule.
    """
    if not isinstance(rule, LayerRule):
        what = (
            f"the class {rule.__name__}; pass an instance" if inspect.isclass(rule) else f"{rule!r}; pass a LayerRule"
        )
        raise TypeError(f"rule: got {what}")
    _RULES[function] = rule


def rule_of(function: Callable[..., Any]) -> LayerRule | None:
    """The rule that is registered for ``function``."""
    return _RULES.get(function)
