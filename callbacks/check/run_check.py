"""``RunCheck``: what is known of a run before its first step: networks, samples, losses, head, theorems, seconds and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_conv.callbacks.run.losses.run_loss import Source
from lightning_conv.callbacks.run.probe import ProbeOutputs
from lightning_conv.reporting.json_values import json_values


@dataclass(frozen=True, kw_only=True)
class TheoremCheck:
    """Whether the theorem of a paper is about a run.

    Attributes:
        paper: Short name, as in ``ConvergenceCriteria(which=...)``.
        source: Authors, year and arXiv number.
        reasons: Why it is not about the run, such as momentum or mini-batches; empty: nothing speaks against it before the first step.
    """

    paper: str
    source: str
    reasons: tuple[str, ...] = ()

    @property
    def applies(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


@dataclass(frozen=True, kw_only=True)
class CostCheck:
    """What measuring one network takes.

    Attributes:
        first: Seconds of the first measurement, finding the network included, as it was made here.
        later: Predicted seconds of a later one.
        waits: Predicted seconds of the first measurement, where the run makes it only once it is long enough for it; 0: at once.
        epoch: Predicted seconds of the forward and backward passes of an epoch; 0: the number of its samples is not known.
        epochs: Number of epochs that the trainer has; None: not known.
        share: Share of the wall time that all later measurements may take.
        every_n_steps: A measurement is made at multiples of it; None: as the share allows.
        choice: What the budget has chosen, and what to write for all of it; empty: all that was asked for is measured.
        memory: Predicted peak of the additional memory of a kernel, in bytes; None: no kernel was planned.
        memory_allowed: Bytes that a kernel may use; None as before.
    """

    first: float
    later: float
    waits: float
    epoch: float
    epochs: int | None
    share: float
    every_n_steps: int | None
    choice: str
    memory: int | None
    memory_allowed: int | None


@dataclass(frozen=True, kw_only=True)
class ScaleCheck:
    """What one measurement would take on each of several ranks, as the model of docs/scale.md predicts it.

    Attributes:
        ranks: Number of ranks, one per device.
        nodes: Number of nodes.
        device: What they run on.
        source: Where its rates come from.
        by: How the kernel is divided: ``"outputs"``, ``"samples"``, or ``"nothing"``.
        seconds: Seconds of a measurement, with its eigenvalues.
        divided: Seconds of a kernel that is divided, with data sent by gloo; where that takes longer, each rank computes the whole kernel.
        direct: The same, if the data went over NVLink or InfiniBand.
        parts: Seconds of each part.
        same: Those of the parts that do not become less with more ranks.
        step: Seconds of a training step; None: the size of its batch is not known.
        memory: Bytes of the additional memory in use.
        parameters: Bytes of the parameters.
        device_memory: Bytes that the device has.
        sent: Bytes that a rank sends.
        messages: Messages to and from other ranks.
    """

    ranks: int
    nodes: int
    device: str
    source: str
    by: str
    seconds: float
    divided: float
    direct: float
    parts: dict[str, float]
    same: dict[str, float]
    step: float | None
    memory: float
    parameters: float
    device_memory: int
    sent: float
    messages: int

    @property
    def share(self) -> float | None:
        """Seconds of a measurement over those of a training step; None: not known."""
        return self.seconds / self.step if self.step else None


@dataclass(frozen=True, kw_only=True)
class NetworkCheck:
    """One network that is measured, as callbacks with equal settings share it.

    Attributes:
        optimizer: Name of the optimizer that trains it; empty in a run with one.
        callbacks: Names of the callbacks that measure it.
        call: How the training step calls it.
        call_source: ``"observed"`` in the training step, or ``"given"`` by the Probe.
        inputs: Shapes of the samples as the network takes them, by name or position.
        samples: Number of samples that are measured.
        of: Number of samples of the training set; None: not known.
        numbers: Numbers of the measured samples in the training set; None: they are not read from it by number.
        n_outputs: Number of outputs of a sample; None: not known before the first measurement.
        outputs: Which kernel is measured.
        kernel: The same in words.
        weights: Number of weights that the kernel is over.
        targets: Shape and type of the targets; empty: none were found.
        loss: The loss of the training step, in words.
        loss_source: ``"observed"``, ``"given"`` or ``"unknown"``.
        cost: What measuring takes.
        theorems: Which papers are about the run.
        scale: What a measurement would take on the ranks that were asked for; None: none were, or ``scale_missing`` says why.
        scale_missing: Why nothing was predicted; empty: something was, or was not asked for.
    """

    optimizer: str
    callbacks: tuple[str, ...]
    call: str
    call_source: str
    inputs: dict[str, tuple[int, ...]]
    samples: int
    of: int | None
    numbers: tuple[int, ...] | None
    n_outputs: int | None
    outputs: ProbeOutputs
    kernel: str
    weights: int
    targets: str
    loss: str
    loss_source: Source
    cost: CostCheck
    theorems: tuple[TheoremCheck, ...]
    scale: ScaleCheck | None = None
    scale_missing: str = ""


@dataclass(frozen=True, kw_only=True)
class HeadCheck:
    """The last linear layer that an ``ExpressivityGuard`` would train in phase 2.

    Attributes:
        name: Its dotted name; empty: there is none that the guard could take.
        features: Number m_H of features that enter it.
        columns: Columns of the matrix [h, 1], or of h where no bias is trained: the largest rank that it can have.
        rows: Number of rows of features of the training set: the rank that the certificate asks for.
        refused: Why there is none, and what to write; empty: there is one.
        asked: Whether the run has a guard.
    """

    name: str = ""
    features: int = 0
    columns: int = 0
    rows: int = 0
    refused: str = ""
    asked: bool = False

    @property
    def is_wide_enough(self) -> bool:
        """Whether the features can have full rank."""
        return bool(self.name) and self.columns >= self.rows


@dataclass(frozen=True, kw_only=True)
class RunCheck:
    """What ``check_run`` has found out.

    Attributes:
        module: Class of the LightningModule.
        networks: What is measured.
        head: What an ``ExpressivityGuard`` would train in phase 2.
        refused: What cannot be measured, and the line to write.
        notes: What the check does not say or has left out.
    """

    module: str
    networks: tuple[NetworkCheck, ...]
    head: HeadCheck
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything that the run's callbacks are to do can be done."""
        return bool(self.networks) and not self.refused and not (self.head.asked and self.head.refused)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain types for JSON: lists, texts, numbers, and None for what is not known."""
        made: dict[str, Any] = json_values(asdict(self))
        return {"ok": self.ok, **made}
