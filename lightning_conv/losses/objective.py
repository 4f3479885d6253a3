"""``Objective``: the training loss as a function of one flat vector of weights, with its derivatives, in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_conv.checked import checked
from lightning_conv.losses.flat_weights import FlatWeights
from lightning_conv.losses.kind import LossFn, loss_kind


class Objective:
    """f(x) = loss(u(x), y) on a whole training set, x the trainable parameters of a model as one vector of P numbers.

    It works on a float64 copy of the model in eval mode. The model is not changed, and every value is a pure function
    of x. The network must be deterministic, and its samples must fit into memory together. ``SampleLoss`` supports
    other networks.

    Args:
        model: any module; parameters with ``requires_grad`` are x, in the order of ``named_parameters``.
        inputs: inputs of the n samples.
        targets: y; they are brought to the shape of the outputs.
        loss_fn: a function of (outputs, targets) that returns one number; all results have the scale of this loss.

    Attributes:
        start: x of the model as it was given, (P,), float64.
        samples: number n of samples.

    Raises:
        ValueError: nothing is trainable, or outputs and targets have different numbers.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, torch.eye(2), torch.zeros(2), nn.MSELoss())
        >>> value, gradient = objective.value_and_gradient(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> value, gradient.tolist()
        (5.0, [3.0, 1.0])
    """

    @checked()
    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> None:
        self._model = copy.deepcopy(model).double().eval()
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("model: no parameter has requires_grad=True; there is nothing to differentiate by")
        self._weights = FlatWeights.of(trained)
        self.start = self._weights.flatten(trained).detach()
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._inputs = inputs.detach().double() if inputs.is_floating_point() else inputs.detach()
        self._loss_fn: LossFn = loss_kind(loss_fn).like(self.start)
        with torch.no_grad():
            shape = self.outputs(self.start).shape
        self.samples = int(shape[0])
        if targets.is_floating_point():
            if targets.numel() != shape.numel():
                raise ValueError(
                    f"targets: {targets.numel()} numbers for outputs of shape {tuple(shape)}; need one for each"
                )
            targets = targets.detach().double().reshape(shape)
        self._targets = targets

    @property
    def size(self) -> int:
        """Number P of weights."""
        return self.start.numel()

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """Return the parameters by name, as views of x."""
        return self._weights.unflatten(x)

    def outputs(self, x: Tensor) -> Tensor:
        """Return u(x), (n, ...)."""
        result: Tensor = functional_call(self._model, self.unflatten(x), (self._inputs,))
        return result

    def residual(self, x: Tensor) -> Tensor:
        """Return R = u(x) - y, N = n C numbers, row i C + c."""
        return (self.outputs(x) - self._targets).flatten()

    def loss(self, x: Tensor) -> Tensor:
        """Return f(x) as a tensor that can be differentiated."""
        return self._loss_fn(self.outputs(x), self._targets)

    def value(self, x: Tensor) -> float:
        """Return f(x)."""
        with torch.no_grad():
            return float(self.loss(x))

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Return f(x) and its gradient: one forward and one backward pass."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = self.loss(x)
            (gradient,) = torch.autograd.grad(loss, x)
        return float(loss.detach()), gradient

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """Return Hess f(x) v: about four passes."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(x), x, create_graph=True)
            (product,) = torch.autograd.grad(gradient, x, v)
        return product

    def jacobian(self, x: Tensor) -> Tensor:
        """Return J(x) = du/dx, (N, P) in float64: N backward passes."""
        jacobian: Tensor = torch.func.jacrev(lambda point: self.outputs(point).flatten())(x.detach())
        return jacobian
