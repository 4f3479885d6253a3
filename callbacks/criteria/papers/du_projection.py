"""``LabelProjection``: the error that the kernel of the start foretells for every later step, beside the one that there is."""

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
    r"""Follows one run of gradient descent on S = 1/2 \|u - y\|^2, whose step sizes may change.

    .. math:: |u(k) - y| \approx \sqrt{\sum_i \langle v_i, u(0) - y \rangle^2 \prod_{j < k} (1 - \eta_j \lambda_i)^2}

    with eigenvalues and eigenvectors of G(0), the first kernel that was measured. Exact where the kernel stays what it was.

    Cost: one eigenvalue problem a run; O(N) numbers and, for each different step size between two measurements, O(N) operations. Source:
    Arora, Du, Hu, Li, Wang 2019 (1901.08584), Theorem 4.1.
    """

    def __init__(self) -> None:
        self._start: int | None = None  # optimizer steps done at the first measurement; None: there was none yet
        self._counted = 0  # steps since then that are in the energies
        self._eigenvalues = self._energies = torch.zeros(0, dtype=torch.float64)
        self._steps: dict[float, int] = {}  # since the last measurement: sizes on S, and how often each was taken
        self._stopped = False
        self._k = math.nan  # the run's loss is k S
        self.shares: dict[str, Tensor] = {}
        """Name -> share of its energy on every eigenvector, by descending eigenvalue: of the labels y, and of y - u(0)."""
        self.curve: list[tuple[int, float, float]] = []
        """Step, \\|u - y\\| as measured, and as predicted (NaN where it is not)."""

    @property
    def begun(self) -> bool:
        """Whether the first measurement was seen."""
        return self._start is not None

    @property
    def follows(self) -> bool:
        """Whether steps are still foretold."""
        return self.begun and not self._stopped

    def begin(self, gram: KernelGram, residual: Tensor, targets: Tensor, k: float, step: int) -> None:
        """The first measurement.

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
        """From here on the steps are none that could be foretold; before the first measurement: nor will they be."""
        self._start, self._stopped = self._start or 0, True
        self._eigenvalues = self._energies = torch.zeros(0, dtype=torch.float64)
        self._steps = {}

    def note_step(self, rate: float) -> None:
        """Before an optimizer step.

        Args:
            rate: eta on the run's loss; NaN: the step is no plain descent.
        """
        if not self.follows:
            return
        if math.isnan(rate):
            self.stop()
        else:
            size = self._k * rate
            self._steps[size] = self._steps.get(size, 0) + 1

    def measure(self, step: int, residual: float) -> None:
        """A measurement, the first one too.

        Args:
            step: optimizer steps done.
            residual: |u - y|.
        """
        predicted = math.nan
        if self.follows:
            assert self._start is not None
            if self._start + self._counted + sum(self._steps.values()) == step:
                self._energies = contracted_energies(self._eigenvalues, self._energies, self._steps)
                self._counted, self._steps = step - self._start, {}
                predicted = math.sqrt(float(self._energies.sum()))
            else:  # steps that were not seen
                self.stop()
        self.curve.append((step, residual, predicted))

    def quantities(self) -> dict[str, float]:
        """``residual`` and ``residual_predicted`` at the last measurement, those that are numbers."""
        if not self.curve:
            return {}
        _, measured, predicted = self.curve[-1]
        found = {"residual": measured, "residual_predicted": predicted}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
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
        """The inverse of ``state_dict``."""
        self._start, self._counted, self._stopped = state["start"], int(state["counted"]), bool(state["stopped"])
        self._k = float(state["k"])
        self._eigenvalues, self._energies = state["eigenvalues"], state["energies"]
        self._steps, self.shares = dict(state["steps"]), dict(state["shares"])
        self.curve = [(int(step), float(measured), float(predicted)) for step, measured, predicted in state["curve"]]
