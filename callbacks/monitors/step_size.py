"""The run's step size against the kernel: its limit 2 / lambda_max, and the contraction it should cause beside the one it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_conv.callbacks.run.loss import LossFn, find_loss
from lightning_conv.callbacks.run.measurement import ProbeKernel
from lightning_conv.callbacks.run.sampling import describe_sampling
from lightning_conv.callbacks.run.steps import NotPlainError, Parameters, describe_steps
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
from lightning_conv.losses.kind import loss_kind
from lightning_conv.networks.evaluation import sample_count


@dataclass
class Interval:
    """What the next measurement will be compared with: the error in the kernel's eigenbasis, and the steps taken since."""

    start: int  # optimizer steps done when it was taken
    eigenvalues: Tensor  # (N,)
    energies: Tensor  # (N,), <v_i, r>^2
    steps: dict[float, int] = field(default_factory=dict)  # step sizes on S, and how often each was taken

    @property
    def end(self) -> int:
        """Optimizer steps done now, if every one of them was noted."""
        return self.start + sum(self.steps.values())


class StepSize:
    """Follows the steps of plain SGD on a squared loss between two measurements of the kernel.

    Args:
        loss_fn: of the training step; None: the one loss module on the LightningModule.
    """

    def __init__(self, loss_fn: LossFn | None) -> None:
        self.loss_fn = loss_fn
        self.remarks: tuple[str, ...] = ()
        """What does not apply, and why."""
        self._parameters: Parameters | None = None
        self._interval: Interval | None = None

    def end(self) -> None:
        """Let go of the run's network; the interval stays, for a run that goes on."""
        self._parameters = None

    def note_step(self, trainer: pl.Trainer, kernel: ProbeKernel) -> None:
        """Before an optimizer step: the rate that it takes, as a scheduler may change it right after."""
        if self._interval is None:
            return
        try:
            step = self._step(trainer, kernel, numbers=len(self._interval.eigenvalues))
        except NotPlainError:
            self._interval = None
            return
        self._interval.steps[step] = self._interval.steps.get(step, 0) + 1

    def measure(
        self, trainer: pl.Trainer, kernel: ProbeKernel, gram: KernelGram, spectrum: Spectrum, step: int
    ) -> dict[str, float]:
        """The scalars; ``remarks`` says what is left out."""
        before, self._interval = self._interval, None
        try:
            size = self._step(trainer, kernel, numbers=gram.n_samples * gram.n_outputs)
        except NotPlainError as error:
            self.remarks = (f"Step size and contraction: not applicable, {error}.",)
            return {}
        metrics = _ratios(size, gram, spectrum)
        self.remarks = () if "kernel/step_size_ratio" in metrics else (_no_ratio(gram),)
        try:
            residual = _residual(trainer.lightning_module, kernel, gram)
        except NotPlainError as error:
            self.remarks += (f"Contraction: not applicable, {error}.",)
            return metrics
        values, vectors = eigen_decomposition(gram.matrix)
        energies = error_energies(vectors, residual)
        if before is not None and before.end == step > before.start:
            then = float(before.energies.sum())
            if then > 0:
                after = contracted_energy(before.eigenvalues, before.energies, before.steps)
                metrics["kernel/contraction_predicted"] = after / then
                metrics["kernel/contraction_measured"] = float(energies.sum()) / then
        if bool(energies.isfinite().all()):
            self._interval = Interval(step, values.cpu(), energies.cpu())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return (
            {} if self._interval is None else {"interval": vars(self._interval) | {"steps": dict(self._interval.steps)}}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        stored = state.get("interval")
        self._interval = None if stored is None else Interval(**{**stored, "steps": dict(stored["steps"])})

    def _step(self, trainer: pl.Trainer, kernel: ProbeKernel, *, numbers: int) -> float:
        """The step size on S over the probe's ``numbers`` that the run's next step has."""
        if self._parameters is None:
            network = kernel.probe.network(trainer.lightning_module)
            self._parameters = Parameters.of(network, kernel.parameters)
        eta = describe_steps(trainer, self._parameters).required_rate()
        loss = loss_kind(find_loss(trainer.lightning_module) if self.loss_fn is None else self.loss_fn)
        if loss.kind == "unknown":
            raise NotPlainError(
                "there is no loss module on the LightningModule; pass loss_fn=nn.MSELoss() if that is the loss"
            )
        if loss.scale(samples=1, outputs=1) is None:
            raise NotPlainError(f"the loss is {loss.described}, not a squared loss (nn.MSELoss)")
        if loss.summed:
            # The sum over a batch is the mean times the numbers in it, of which there are numbers / m per sample.
            eta *= _batch_size(trainer) * numbers / sample_count(kernel.inputs)
        return step_in_sum_of_squares(eta, loss="mean", numbers=numbers)


def report(remarks: Sequence[str]) -> str:
    """What is said beside the scalars, as Markdown."""
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


def _residual(pl_module: pl.LightningModule, kernel: ProbeKernel, gram: KernelGram) -> Tensor:
    """r = u - y on the probe, flat, in the order of the full kernel's rows."""
    if not is_full(gram):
        raise NotPlainError(f'it needs the full kernel of the {gram.n_outputs} outputs: Probe(outputs="full")')
    if kernel.targets is None:
        raise NotPlainError("no targets of the probe are known: Probe(target_fn=lambda batch: ...)")
    outputs = kernel.outputs(pl_module).double()
    if kernel.targets.numel() != outputs.numel():
        raise NotPlainError(
            f"the targets have shape {tuple(kernel.targets.shape)} and the outputs {tuple(outputs.shape)}; bring them into one shape by "
            "Probe(target_fn=lambda batch: ...)"
        )
    return (outputs - kernel.targets.to(outputs).reshape(outputs.shape)).flatten()


def _batch_size(trainer: pl.Trainer) -> int:
    try:
        size = describe_sampling(trainer).largest_batch
    except MisconfigurationException:
        size = None
    if size is None:
        raise NotPlainError(
            "with MSELoss(reduction='sum') the step depends on the batch size, which the training loader does not tell"
        )
    return size
