"""``Objective``: the training loss as a function of one flat vector of weights, with its derivatives, in float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_conv.losses.kind import LossFn


class Objective:
    """f(x) = loss(u(x), y) on a whole training set, x the trainable parameters of a model as one vector of P numbers.

    Works on a float64 copy in eval mode: the model stays as it is, and nothing here changes the copy either, every
    value is a pure function of x. For deterministic networks whose samples fit into memory together.

    Args:
        model: any module; parameters with ``requires_grad`` are x, in the order of ``named_parameters``.
        inputs: n samples.
        targets: y; they are brought to the shape of the outputs.
        loss_fn: of (outputs, targets), one number; the scale of everything that comes out is the scale of this loss.

    Attributes:
        start: x of the model as it was given, (P,).
        samples: n.

    Raises:
        ValueError: nothing is trainable, or outputs and targets have different numbers.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> objective = Objective(model, torch.eye(2), torch.zeros(2), nn.MSELoss())
        >>> value, gradient = objective.value_and_gradient(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> value, gradient.tolist()
        (5.0, [3.0, 1.0])
    """

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> None:
        self._model = copy.deepcopy(model).double().eval()
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("model: no parameter has requires_grad=True; there is nothing to differentiate by")
        self._shapes = {name: p.shape for name, p in trained.items()}
        self._sizes = [p.numel() for p in trained.values()]
        self.start = torch.cat([p.detach().flatten() for p in trained.values()])
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._inputs = inputs.detach().double() if inputs.is_floating_point() else inputs.detach()
        self._loss_fn = loss_fn
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
        """P, the number of weights."""
        return self.start.numel()

    def unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters by name, as views of x."""
        parts = torch.split(x, self._sizes)
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def outputs(self, x: Tensor) -> Tensor:
        """u(x), (n, ...)."""
        result: Tensor = functional_call(self._model, self.unflatten(x), (self._inputs,))
        return result

    def residual(self, x: Tensor) -> Tensor:
        """R = u(x) - y, N = n C numbers, row i C + c."""
        return (self.outputs(x) - self._targets).flatten()

    def loss(self, x: Tensor) -> Tensor:
        """f(x) as a tensor that can be differentiated."""
        return self._loss_fn(self.outputs(x), self._targets)

    def value(self, x: Tensor) -> float:
        """f(x)."""
        with torch.no_grad():
            return float(self.loss(x))

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """f(x) and its gradient: one forward and one backward pass."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = self.loss(x)
            (gradient,) = torch.autograd.grad(loss, x)
        return float(loss.detach()), gradient

    def hessian_product(self, x: Tensor, v: Tensor) -> Tensor:
        """Hess f(x) v: about four passes."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(x), x, create_graph=True)
            (product,) = torch.autograd.grad(gradient, x, v)
        return product

    def jacobian(self, x: Tensor) -> Tensor:
        """J(x) = du/dx, (N, P) in float64: N backward passes."""
        jacobian: Tensor = torch.func.jacrev(lambda point: self.outputs(point).flatten())(x.detach())
        return jacobian
