"""``StepSize``: the run's step size against its limit 2 / lambda_max, and the predicted contraction beside the measured one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_conv.callbacks.run.measured_kernel import is_of_loss, not_full
from lightning_conv.callbacks.run.steps import NotPlainError
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.kernels.contraction import (
    contracted_energy,
    error_energies,
    full_lambda_max,
    is_full,
    step_in_sum_of_squares,
    step_size_ratio,
)
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum, eigen_decomposition


@dataclass
class Interval:
    """What the next measurement is compared with: the error in the kernel's eigenbasis, and the steps taken since."""

    start: int  # optimizer steps done when it was taken
    eigenvalues: Tensor  # (N,)
    energies: Tensor  # (N,), <v_i, r>^2
    steps: dict[float, int] = field(default_factory=dict)  # step sizes on S, and how often each was taken

    @property
    def end(self) -> int:
        """Number of optimizer steps done by now, if each of them was noted."""
        return self.start + sum(self.steps.values())


class StepSize:
    """Follows the steps of plain SGD on a squared loss between two measurements of the kernel."""

    def __init__(self) -> None:
        self.remarks: tuple[str, ...] = ()  # what does not apply, and why
        self._interval: Interval | None = None

    @property
    def follows(self) -> bool:
        """Whether there is something to predict for which the steps must be noted."""
        return self._interval is not None

    def before_step(self, run: RunView) -> None:
        """Note the rate of the step that is about to be made; a scheduler may change it right after."""
        if self._interval is None:
            return
        try:
            step = _step(run, numbers=len(self._interval.eigenvalues))
        except NotPlainError:
            self._interval = None
            return
        self._interval.steps[step] = self._interval.steps.get(step, 0) + 1

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Return the scalars of a measurement; ``remarks`` says what is left out."""
        before, self._interval = self._interval, None
        if is_of_loss(gram):
            self.remarks = (f"Step size and contraction: not applicable, {not_full(gram)}.",)
            return {}
        try:
            size = _step(run, numbers=gram.n_samples * gram.n_outputs)
        except NotPlainError as error:
            self.remarks = (f"Step size and contraction: not applicable, {error}.",)
            return {}
        metrics = _ratios(size, gram, spectrum)
        self.remarks = () if "kernel/step_size_ratio" in metrics else (_no_ratio(gram),)
        try:
            residual = _residual(run, gram)
        except NotPlainError as error:
            self.remarks += (f"Contraction: not applicable, {error}.",)
            return metrics
        values, vectors = eigen_decomposition(gram.matrix)
        energies = error_energies(vectors, residual)
        if before is not None and before.end == run.step > before.start:
            then = float(before.energies.sum())
            if then > 0:
                after = contracted_energy(before.eigenvalues, before.energies, before.steps)
                metrics["kernel/contraction_predicted"] = after / then
                metrics["kernel/contraction_measured"] = float(energies.sum()) / then
        if bool(energies.isfinite().all()):
            self._interval = Interval(run.step, values.cpu(), energies.cpu())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        if self._interval is None:
            return {}
        return {"interval": vars(self._interval) | {"steps": dict(self._interval.steps)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        stored = state.get("interval")
        self._interval = None if stored is None else Interval(**{**stored, "steps": dict(stored["steps"])})


def _step(run: RunView, *, numbers: int) -> float:
    """Return the size of the run's next step on S over the probe's ``numbers``.

    Raises:
        NotPlainError: the step is not plain descent on a squared loss.
    """
    eta = run.unclipped_steps.required_rate()
    if run.loss.kind == "unknown":
        why = run.loss_unknown or "the loss is not known"
        raise NotPlainError(f"{why}; pass loss_fn=nn.MSELoss() if that is the loss")
    if run.loss.scale(samples=1, outputs=1) is None:
        raise NotPlainError(f"the loss is {run.loss.described}, not a squared loss (nn.MSELoss)")
    eta *= run.loss.factor
    if run.loss.summed:
        # The sum over a batch is the mean times the numbers in it, of which there are numbers / m per sample.
        eta *= _batch_size(run) * numbers / run.samples
    return step_in_sum_of_squares(eta, loss="mean", numbers=numbers)


def report(remarks: Sequence[str]) -> str:
    """Return the text beside the scalars, as Markdown."""
    about = (
        "The step size is that on S = 1/2 sum (u - y)^2 over the probe; over its limit 2 / lambda_max, below 1 is stable in the linearised "
        "model. The contraction is |u - y|^2 on the probe over its value at the measurement before; predicted is what gradient descent "
        "would make of it if the kernel stayed what it was. Exact for a linear model trained on the whole probe at once; an estimate for "
        "mini-batches, a probe that is a part of the training set, dropout, and BatchNorm in training."
    )
    return "\n\n".join((about, *remarks))


def _ratios(size: float, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
    lower, upper = full_lambda_max(gram, spectrum)
    metrics = {"kernel/step_size_ratio": step_size_ratio(size, spectrum.lambda_max.value)} if is_full(gram) else {}
    if lower > 0:
        metrics["kernel/step_size_ratio_lower"] = step_size_ratio(size, lower)
    if math.isfinite(upper):
        metrics["kernel/step_size_ratio_upper"] = step_size_ratio(size, upper)
    return metrics


def _no_ratio(gram: KernelGram) -> str:
    return (
        f'Step size: with outputs="{gram.outputs}" and {gram.n_outputs} outputs lambda_max of the full kernel is known up to bounds at '
        'best; Probe(outputs="full") gives it.'
    )


def _residual(run: RunView, gram: KernelGram) -> Tensor:
    """Return r = u - y on the probe, flat, in the order of the full kernel's rows.

    Raises:
        NotPlainError: the kernel is not the full one, or there are no targets in the shape of the outputs.
    """
    if not is_full(gram):
        raise NotPlainError(f'it needs the full kernel of the {gram.n_outputs} outputs: Probe(outputs="full")')
    if run.targets is None:
        raise NotPlainError("no targets of the probe are known: Probe(target_fn=lambda batch: ...)")
    outputs = run.outputs.double()
    if run.targets.numel() != outputs.numel():
        raise NotPlainError(
            f"the targets have shape {tuple(run.targets.shape)} and the outputs {tuple(outputs.shape)}; bring them into one shape by "
            "Probe(target_fn=lambda batch: ...)"
        )
    return (outputs - run.targets.to(outputs).reshape(outputs.shape)).flatten()


def _batch_size(run: RunView) -> int:
    """Return the number of samples in a batch.

    Raises:
        NotPlainError: the training loader does not tell.
    """
    try:
        size = run.sampling.largest_batch
    except MisconfigurationException:
        size = None
    if size is None:
        raise NotPlainError(
            "with MSELoss(reduction='sum') the step depends on the batch size, which the training loader does not tell"
        )
    return size
