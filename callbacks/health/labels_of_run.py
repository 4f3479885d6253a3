"""``LabelsOfRun``: the labels of the probe that the other samples contradict, asked until the network knows labels by heart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_conv.callbacks.run.features import LastFeatures
from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_labels import finding_of_labels, knows_by_heart, traced
from lightning_conv.health.labels.audit_labels import audit_labels
from lightning_conv.health.labels.suspicious_labels import MARGIN, Baseline, LabelAudit
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.losses.per_sample import SampleLosses


class LabelsOfRun:
    """Follows one run.

    Attributes:
        audit: The last one before the network knew labels by heart, or the first one of the run; None: there was none.
        step: Step of it.
        numbers: Number of each sample in the training set; None: not known.
        undecided: Why the labels could not be audited; empty if they were.
    """

    def __init__(self) -> None:
        self.audit: LabelAudit | None = None
        self.step = 0
        self.numbers: list[int] | None = None
        self.undecided = ""
        self._ended = False  # nothing can replace the audit

    def measure(self, run: RunView, gram: KernelGram, losses: SampleLosses | None) -> Finding | None:
        """Audit the labels at the weights of now, unless an earlier audit is to be kept.

        Args:
            run: The run at this moment.
            gram: The kernel on the probe.
            losses: The losses of the probe's samples; None: they have no formula.

        Returns:
            The finding of the audit that is kept; None: there is none, and ``undecided`` says why.

        Cost: two eigendecompositions of the kernel and one for each of two baselines, and what ``RunView.features`` takes.
        """
        if not self._ended:
            try:
                self._look(run, gram, losses)
            except ValueError as error:
                self.undecided = str(error)
        return self._finding()

    def _look(self, run: RunView, gram: KernelGram, losses: SampleLosses | None) -> None:
        targets, kernel = run.targets, _kernel(gram)
        if targets is None:
            raise ValueError("no targets are known")
        bare = audit_labels(kernel, targets)
        by_heart = knows_by_heart(run.outputs, bare)
        self._ended = by_heart is not False
        if self.audit is not None and self._ended:
            return
        left_out: dict[Baseline, str] = {}
        found = run.features
        features = found.values if isinstance(found, LastFeatures) else None
        if isinstance(found, str):
            left_out["features"] = found
        each = None
        if losses is None or losses.kind == "custom":
            left_out["loss"] = "the loss has no formula for a single sample"
        else:
            with attempted(*READING) as attempt:
                each = losses.each(run.outputs.detach().cpu().double(), slice(None))
            if attempt.failed:
                left_out["loss"] = str(attempt.error)
        self.audit = audit_labels(
            kernel, targets, inputs=run.measurement.inputs, features=features, losses=each, left_out=left_out
        )
        self.step, self.undecided = run.step, ""
        self.numbers = self.numbers or run.measurement.numbers

    def _finding(self) -> Finding | None:
        return None if self.audit is None else finding_of_labels(self.audit, numbers=self.numbers, step=self.step)

    @property
    def markdown(self) -> str:
        """Return the table of the audit with its legend; empty: there is none."""
        if self.audit is None:
            return ""
        return f"Labels of the probe at step {self.step}.\n\n{self.audit.markdown(numbers=self.numbers)}"

    @property
    def narrow(self) -> str:
        """Return the table of the audit in four columns, for the text of a logger; empty: there is none."""
        if self.audit is None:
            return ""
        return (
            f"Labels of the probe at step {self.step}.\n\n{self.audit.narrow_table(numbers=self.numbers)}\n\n{MARGIN}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types and tensors."""
        audit = None if self.audit is None else {name: _plain(value) for name, value in vars(self.audit).items()}
        return {**vars(self), "audit": audit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        vars(self).update(state)
        self.audit = None if state["audit"] is None else LabelAudit(**state["audit"])


def _kernel(gram: KernelGram) -> Tensor:
    """Return the trace kernel, or its estimate.

    Raises:
        ValueError: The kernel is another one.
    """
    if gram.outputs == "full":
        return traced(gram.matrix, gram.n_outputs)
    if gram.outputs in ("trace", "projected"):
        return gram.matrix
    other = "of the loss gradients" if gram.outputs == "cotangents" else "of the sum of the outputs"
    raise ValueError(f'the kernel is that {other}; Probe(outputs="trace") gives one that knows the classes')


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
