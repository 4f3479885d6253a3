r"""``LinearisedRun`` and ``forecast_losses``: the loss at later steps if the kernel stays as it is.

Source: Jacot, Gabriel, Hongler 2018 (1806.07572, section 5: descent in function space); Lee et al. 2019 (1902.06720, section 2.2: the
linearised network under gradient descent and momentum). The present kernel, in place of that at the start, is used here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_conv.arguments import described, require_callable, require_type, require_whole
from lightning_conv.health.kernel.kernel_modes import KernelModes
from lightning_conv.health.step.update_rule import UpdateRule

MOST = 2000
"""Steps that a loss other than the squared one is continued for; every one of them takes an evaluation of its gradient."""


class LinearisedRun:
    r"""A run of the linearised network on its own samples, from the present outputs on.

    The outputs u follow the recurrence of the optimizer with the kernel :math:`\Theta = J D J^T` of the present,

    .. math:: m \leftarrow a m + b \Theta s(u), \qquad u \leftarrow u - (c m + e \Theta s(u)), \qquad s(u) = \nabla_u L(u)

    where D holds the step sizes (rate over preconditioner) and a, b, c, e are those of ``UpdateRule``. For networks that are
    linear in their weights it is the run itself, if every step sees all samples. Noise of mini-batches, weight decay and the change
    of the kernel and of the preconditioner are left out, and a probe stands for the training set; how much this matters is seen
    only by comparing (``ForecastRecord``).

    With a squared loss :math:`L(u) = \mathrm{rest} + \frac{\kappa}{2} |u - y|^2` the coordinates along the eigenvectors of Theta are
    independent. Each of them follows a linear recurrence of order two, whose matrix is raised to the power of the number of steps.
    Other losses are evaluated at every step.

    Args:
        modes: Theta; for N = n it acts on every column of the outputs alike.
        outputs: u, (n, ...), the present ones, in the type that the loss is to be computed in; float64 is best.
        loss: L, a function of outputs of this shape that returns the loss of the run, a number.
        rule: The recurrence of the optimizer.
        velocity: m, in the outputs: J times the momentum of the weights times their step sizes, of the shape of the outputs; None: 0.
        curvature: kappa, if the loss is squared in this sense: 2 / (n C) for a mean over all outputs. None: another loss.
        scale: Rate of the step with this number (0 is the next one) relative to the present rate; None: it stays.

    Raises:
        TypeError: An argument has another type, or the loss returns something else than a number that depends on the outputs.
        ValueError: The modes or ``velocity`` do not fit the outputs, or ``curvature`` is not positive.

    Cost: one evaluation of the loss and its gradient; then for a squared loss O(k log t) for t steps, otherwise an evaluation and
    4 N k flops per step and column.
    """

    def __init__(
        self,
        modes: KernelModes,
        outputs: Tensor,
        loss: Callable[[Tensor], Tensor],
        *,
        rule: UpdateRule | None = None,
        velocity: Tensor | None = None,
        curvature: float | None = None,
        scale: Callable[[int], float] | None = None,
    ) -> None:
        require_type("modes", modes, KernelModes, "KernelModes.of_matrix(...), or of_products")
        require_type("outputs", outputs, Tensor, "the present outputs, (n, ...)")
        if not outputs.is_floating_point():
            raise TypeError(f"outputs: {outputs.dtype}; need a floating type, such as float64")
        require_callable("loss", loss, "a function of the outputs that returns the loss of the run")
        if rule is not None:
            require_type("rule", rule, UpdateRule, "an UpdateRule, or None for plain descent")
        if velocity is not None:
            require_type("velocity", velocity, Tensor, "a tensor of the shape of the outputs, or None")
            if velocity.shape != outputs.shape:
                raise ValueError(
                    f"velocity: shape {tuple(velocity.shape)}; need that of the outputs, {tuple(outputs.shape)}"
                )
        if scale is not None:
            require_callable("scale", scale, "a function of the number of the step, or None")
        size = len(modes.vectors)
        if size not in (len(outputs), outputs.numel()):
            raise ValueError(
                f"modes: vectors of {size} numbers for outputs of shape {tuple(outputs.shape)}; need n or all outputs"
            )
        if curvature is not None and not (isinstance(curvature, Real) and 0 < curvature < math.inf):
            raise ValueError(
                f"curvature: {described(curvature)}; need a positive number, or None for a loss that is not squared"
            )
        self.steps = 0
        self._modes, self._loss, self._rule = modes, loss, rule or UpdateRule()
        self._outputs, self._curvature, self._scale = outputs.detach(), curvature, scale
        self._moved = modes.vectors.new_zeros(modes.values.numel(), outputs.numel() // size)  # V^T (u - u_0)
        self._velocity = torch.zeros_like(self._moved) if velocity is None else self._along(velocity)
        self._start, gradient = self._evaluate(self._outputs)
        self._slope = self._along(gradient)  # V^T s(u_0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the loss in plain types and tensors.

        Raises:
            ValueError: There is a schedule of rates, which is a function.
        """
        if self._scale is not None:
            raise ValueError("scale: a function is not kept; continue such a run before it is stored")
        tensors = {
            "values": self._modes.values,
            "vectors": self._modes.vectors,
            "outputs": self._outputs,
            "moved": self._moved,
            "velocity": self._velocity,
            "slope": self._slope,
        }
        plain = {"steps": self.steps, "rule": asdict(self._rule), "curvature": self._curvature, "start": self._start}
        return {name: each.cpu() for name, each in tensors.items()} | plain

    @classmethod
    def from_state(cls, state: Mapping[str, Any], loss: Callable[[Tensor], Tensor]) -> LinearisedRun:
        """Return the run that ``state_dict`` wrote.

        Args:
            state: The state.
            loss: L, as it was.
        """
        made = cls.__new__(cls)
        made.steps, made._loss, made._scale = state["steps"], loss, None
        made._modes, made._rule = KernelModes(state["values"], state["vectors"]), UpdateRule(**state["rule"])
        made._outputs, made._curvature, made._start = state["outputs"], state["curvature"], state["start"]
        made._moved, made._velocity, made._slope = state["moved"], state["velocity"], state["slope"]
        return made

    @property
    def is_squared(self) -> bool:
        """Return whether the loss is squared, so that any number of steps costs next to nothing."""
        return self._curvature is not None

    def advance(self, steps: int) -> float:
        """Continue by this number of steps and return the loss; ``inf`` where it overflows.

        Raises:
            TypeError: It is no whole number.
            ValueError: The number is negative, or a loss that is not squared is continued for more than ``MOST`` steps.
        """
        require_whole("steps", steps, least=0)
        if self._curvature is None and self.steps + steps > MOST:
            raise ValueError(f"steps: {self.steps + steps}; a loss that is not squared is continued for at most {MOST}")
        ahead = range(self.steps, self.steps + steps)
        self.steps += steps
        if self._curvature is None:
            for number in ahead:
                self._step(1.0 if self._scale is None else self._scale(number))
            return _finite(self._evaluate(self._present())[0])
        alike = [(1.0, steps)] if self._scale is None else _runs(self._scale(number) for number in ahead)
        for scale, count in alike:
            self._power(scale, self._curvature, count)
        return self._squared_loss(self._curvature)

    def _step(self, scale: float) -> None:
        slope = scale * self._modes.values[:, None] * self._along(self._evaluate(self._present())[1])
        self._velocity = self._rule.a * self._velocity + self._rule.b * slope
        self._moved = self._moved - self._rule.c * self._velocity - self._rule.e * slope

    def _power(self, scale: float, curvature: float, count: int) -> None:
        """Take ``count`` steps at once; the coordinates are x = V^T (u - y) and m."""
        rule, h = self._rule, scale * curvature * self._modes.values
        matrix = torch.empty(len(h), 2, 2, dtype=h.dtype, device=h.device)
        matrix[:, 0, 0], matrix[:, 0, 1] = rule.a, rule.b * h
        matrix[:, 1, 0], matrix[:, 1, 1] = -rule.c * rule.a, 1 - h * (rule.c * rule.b + rule.e)
        origin = self._slope / curvature
        state = torch.stack([self._velocity, origin + self._moved], 1)
        state = torch.linalg.matrix_power(matrix, count) @ state
        self._velocity, self._moved = state[:, 0], state[:, 1] - origin

    def _squared_loss(self, curvature: float) -> float:
        """Return the loss: the coordinates outside the modes keep their share of it."""
        origin = self._slope / curvature
        outside = max(self._start - curvature / 2 * float(origin.square().sum()), 0.0)
        return _finite(outside + curvature / 2 * float((origin + self._moved).square().sum()))

    def _present(self) -> Tensor:
        moved = (self._modes.vectors @ self._moved).reshape(self._outputs.shape)
        return (self._outputs + moved).to(self._outputs.dtype)

    def _along(self, values: Tensor) -> Tensor:
        rows = values.detach().to(self._modes.vectors).reshape(len(self._modes.vectors), -1)
        return self._modes.vectors.T @ rows

    def _evaluate(self, outputs: Tensor) -> tuple[float, Tensor]:
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            value = self._loss(leaf)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise TypeError(
                    f"loss: returned {described(value)}; need a tensor of one number, computed from the outputs"
                )
            (gradient,) = torch.autograd.grad(value.reshape(()), leaf)
        return float(value.detach()), gradient


def forecast_losses(run: LinearisedRun, ahead: Sequence[int]) -> list[float]:
    """Return the losses after these numbers of steps from where the run is.

    Args:
        run: The run, which is advanced by the last of the numbers.
        ahead: Numbers of steps, positive and ascending.

    Raises:
        TypeError: They are no list of whole numbers.
        ValueError: The numbers are not positive and ascending, or too large (``LinearisedRun.advance``).

    Example:
        >>> import torch
        >>> modes = KernelModes.of_matrix(torch.tensor([[0.5]]))
        >>> run = LinearisedRun(modes, torch.ones(1, 1), lambda u: u.square().sum() / 2, curvature=1.0)
        >>> forecast_losses(run, [1, 2])  # u is halved by every step
        [0.125, 0.03125]
    """
    require_type("ahead", ahead, Sequence, "a list of numbers of steps")
    for each in ahead:
        require_whole("ahead", each, least=1)
    if any(later <= earlier for earlier, later in itertools.pairwise([0, *ahead])):
        raise ValueError(f"ahead: {list(ahead)}; need positive numbers of steps in ascending order")
    return [run.advance(later - earlier) for earlier, later in itertools.pairwise([0, *ahead])]


def _runs(scales: Iterable[float]) -> list[tuple[float, int]]:
    """Return equal neighbours with their number."""
    return [(scale, len(list(group))) for scale, group in itertools.groupby(scales)]


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
