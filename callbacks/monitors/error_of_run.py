"""``ErrorOfRun``: the error of a run in the eigenbasis of its first kernel, at steps that are evenly spaced on a logarithmic scale."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from lightning_conv.callbacks.run.measured_kernel import is_of_loss
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.kernels.contraction import is_full
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum, eigen_decomposition
from lightning_conv.reporting.figures.error_modes import mode_components, mode_groups, plot_error_modes
from lightning_conv.reporting.log_steps import LogSteps

MOST_ROWS = 512
"""Rows of the largest kernel that is decomposed for this figure: 0.1 s on one core of a server (2026)."""


class ErrorOfRun:
    r"""Follows R, the gradient of the loss of each sample by its outputs, which for a squared loss is a multiple of u - y.

    A measurement notes the length of the projection of R onto the spaces of the leading eigenvectors of the first kernel, in groups
    (``mode_groups``). A kernel that C outputs share is that of each column of R.

    Attributes:
        reason: Why the last measurement has nothing; empty: it has.

    Cost: one eigendecomposition per fit, and per measurement the outputs on the probe (shared) and the loss on them. Memory: N x N numbers,
    which are not in checkpoints, and at most 32 rows of a dozen numbers, which are.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._seen = LogSteps()
        self._groups: list[tuple[int, int]] = []
        self._below = 0
        self._vectors: Tensor | None = None  # of the first kernel
        self._seconds = 0.0  # that the last measurement took

    def measure(self, kernel: Measurement, first: KernelGram, spectrum: Spectrum, step: int) -> None:
        """Note the error at the weights of now, or why there is none.

        Args:
            kernel: What is measured.
            first: The first kernel of the run.
            spectrum: Its spectrum.
            step: Optimizer steps done.
        """
        self.reason = self._why_not(kernel, first)
        # The step's own loss is any code of the user's: all processes run it, or none.
        if not self.reason and not kernel.decisions.alike(kernel.schedule.allows_beside(self._seconds, step)):
            self.reason = "the run has no time for it at this step"
        if self.reason:
            return
        begun = time.perf_counter()
        slope = kernel.probe_loss.gradients(lambda: kernel.moment().shaped_outputs, kernel.targets, kernel.rows)
        residual = slope.flatten() if is_full(first) else slope
        if residual.shape[0] != len(first.matrix):
            self.reason = f"the gradient of the loss has {residual.shape[0]} rows, and the kernel {len(first.matrix)}"
            return
        if self._vectors is None:
            groups = mode_groups(len(first.matrix), spectrum.count_below_floor)
            if groups != self._groups:
                self._groups, self._below, self._seen = groups, spectrum.count_below_floor, LogSteps()
            self._vectors = eigen_decomposition(first.matrix)[1]
        self._seen.note(step, mode_components(self._vectors, residual, self._groups))
        self._seconds = time.perf_counter() - begun

    @staticmethod
    def _why_not(kernel: Measurement, first: KernelGram) -> str:
        if is_of_loss(first):
            return "the kernel is that of the loss gradients, in whose eigenbasis the error has no components"
        if first.outputs == "sum" and first.n_outputs > 1:
            return f"the kernel is that of the sum of {first.n_outputs} outputs, and the error is that of each of them"
        if len(first.matrix) > MOST_ROWS:
            return f"the kernel has {len(first.matrix)} rows, and more than {MOST_ROWS} are not decomposed for a figure"
        if not kernel.knows_loss:
            return kernel.loss_unknown or "no targets of the probe are known: Probe(target_fn=lambda batch: ...)"
        return ""

    def __len__(self) -> int:
        return len(self._seen)

    def figure(self) -> Figure:
        """Draw what was noted."""
        return plot_error_modes(self._seen, self._groups, self._below)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        groups = [list(each) for each in self._groups]
        return {"seen": self._seen.state_dict(), "groups": groups, "below": self._below}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; an empty state empties it."""
        self._seen.load_state_dict(state.get("seen", {}))
        self._groups = [(int(first), int(last)) for first, last in state.get("groups", ())]
        self._below, self._vectors = int(state.get("below", 0)), None
