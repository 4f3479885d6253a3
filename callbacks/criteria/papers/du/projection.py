"""``LabelProjection``: the error that the initial kernel predicts for every later step, beside the measured one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_conv.kernels.contraction import contracted_energies, error_energies
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import eigen_decomposition


class LabelProjection:
    r"""Follows one run of gradient descent on S = 1/2 \|u - y\|^2; the step sizes may change.

    .. math:: |u(k) - y| \approx \sqrt{\sum_i \langle v_i, u(0) - y \rangle^2 \prod_{j < k} (1 - \eta_j \lambda_i)^2}

    with the eigenvalues and eigenvectors of G(0), the first kernel that was measured. It is exact where the kernel does not change.

    Cost: one eigenvalue problem per run; O(N) numbers and, for each different step size between two measurements, O(N) operations.

    Source: Arora, Du, Hu, Li, Wang 2019 (1901.08584), Theorem 4.1.
    """

    def __init__(self) -> None:
        self._start: int | None = None  # optimizer steps done at the first measurement; None: before it
        self._counted = 0  # steps since then that the energies include
        self._eigenvalues = self._energies = torch.zeros(0, dtype=torch.float64)
        self._steps: dict[float, int] = {}  # since the last measurement: sizes on S, and how often each was taken
        self._stopped = False
        self._k = math.nan  # the run's loss is k S
        # Name (the labels y, or y - u(0)) -> share of its energy on every eigenvector, by descending eigenvalue.
        self.shares: dict[str, Tensor] = {}
        # Step, measured |u - y|, and predicted |u - y| (NaN: not predicted).
        self.curve: list[tuple[int, float, float]] = []

    @property
    def begun(self) -> bool:
        """Whether there was a first measurement."""
        return self._start is not None

    @property
    def follows(self) -> bool:
        """Whether the effect of steps is still predicted."""
        return self.begun and not self._stopped

    def begin(self, gram: KernelGram, residual: Tensor, targets: Tensor, k: float, step: int) -> None:
        """Begin with the first measurement.

        Args:
            gram: the full kernel, row i C + c.
            residual: u - y, in the order of its rows.
            targets: y, likewise.
            k: of the run's loss k S.
            step: optimizer steps done.
        """
        values, vectors = eigen_decomposition(gram.matrix)
        self._start, self._counted, self._stopped, self._k = step, 0, False, k
        self._eigenvalues, self._energies = values.cpu(), error_energies(vectors, residual).cpu()
        energies = {"labels y": error_energies(vectors, targets).cpu(), "error y - u(0)": self._energies}
        self.shares = {name: each.flip(0) / each.sum() for name, each in energies.items() if float(each.sum()) > 0}

    def stop(self) -> None:
        """Predict no further steps: they are not those of gradient descent on S."""
        self._start, self._stopped = self._start or 0, True
        self._eigenvalues = self._energies = torch.zeros(0, dtype=torch.float64)
        self._steps = {}

    def before_step(self, rate: float) -> None:
        """Note the optimizer step that is about to be made.

        Args:
            rate: eta on the run's loss; NaN: the step is not plain descent.
        """
        if not self.follows:
            return
        if math.isnan(rate):
            self.stop()
        else:
            size = self._k * rate
            self._steps[size] = self._steps.get(size, 0) + 1

    def measure(self, step: int, residual: float) -> None:
        """Add a measurement to the curve; a second one of the same step is ignored.

        Args:
            step: optimizer steps done.
            residual: |u - y|.
        """
        if self.curve and self.curve[-1][0] == step:
            return
        predicted = math.nan
        if self.follows:
            assert self._start is not None
            if self._start + self._counted + sum(self._steps.values()) == step:
                self._energies = contracted_energies(self._eigenvalues, self._energies, self._steps)
                self._counted, self._steps = step - self._start, {}
                predicted = math.sqrt(float(self._energies.sum()))
            else:  # some steps were not seen
                self.stop()
        self.curve.append((step, residual, predicted))

    def quantities(self) -> dict[str, float]:
        """Return ``residual`` and ``residual_predicted`` at the last measurement, as far as they are known."""
        if not self.curve:
            return {}
        _, measured, predicted = self.curve[-1]
        found = {"residual": measured, "residual_predicted": predicted}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {
            "start": self._start,
            "counted": self._counted,
            "eigenvalues": self._eigenvalues,
            "energies": self._energies,
            "steps": dict(self._steps),
            "stopped": self._stopped,
            "k": self._k,
            "shares": dict(self.shares),
            "curve": [list(each) for each in self.curve],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._start, self._counted, self._stopped = state["start"], int(state["counted"]), bool(state["stopped"])
        self._k = float(state["k"])
        self._eigenvalues, self._energies = state["eigenvalues"], state["energies"]
        self._steps, self.shares = dict(state["steps"]), dict(state["shares"])
        self.curve = [(int(step), float(measured), float(predicted)) for step, measured, predicted in state["curve"]]
