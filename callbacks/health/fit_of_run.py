"""What a run can reach on its probe: the loss that equal inputs force, and that a narrow last layer forces."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_conv.callbacks.run.features import LastFeatures
from lightning_conv.callbacks.run.guarded import READING, attempted
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_fit import finding_of_floor, finding_of_width
from lightning_conv.health.fit.equal_inputs import EqualInputs
from lightning_conv.health.fit.loss_floor import LossFloor, loss_floor
from lightning_conv.health.fit.width_floor import width_floor
from lightning_conv.losses.per_sample import SampleLosses
from lightning_conv.networks.inputs import Inputs


@dataclass(frozen=True)
class FitOfRun:
    """What does not change during a fit.

    Attributes:
        losses: The losses of the probe's samples; None: the loss is none whose formula is known.
        floor: What equal inputs force; None: not known.
        labels: Whether the targets are class numbers.
        outputs: Number of outputs of a sample.
    """

    losses: SampleLosses | None
    floor: LossFloor | None
    labels: bool
    outputs: int

    @classmethod
    def of(cls, run: RunView, outputs: int) -> FitOfRun:
        """Look at the probe's samples and targets.

        Args:
            run: The run, with a known loss or without.
            outputs: Number C of outputs of a sample.

        Cost: a hash of every sample.
        """
        losses, floor = None, None
        targets = run.targets
        if not run.loss_unknown and run.run_loss.own is None and targets is not None:
            with attempted(*READING):  # a loss of sequences, or of masked labels, has no losses of samples
                losses = SampleLosses(run.loss.loss_fn, targets.cpu(), outputs=outputs)
        if losses is not None and losses.kind != "custom":
            with attempted(*READING):
                floor = loss_floor(losses, equal_samples(run.measurement.inputs))
        labels = targets is not None and not targets.is_floating_point()
        return cls(losses, floor, labels, outputs)

    def findings(self, features: LastFeatures | str, loss: float | None, step: int) -> list[Finding]:
        """Return what is found about the least loss, beside the present one.

        Args:
            features: The last hidden features on the probe; a string: why there are none.
            loss: The present loss on it, in eval mode; None: not known.
            step: Step of the loss.
        """
        found = []
        if self.floor is not None:
            what = "labels" if self.labels else "targets"
            found.append(finding_of_floor(self.floor, loss=loss, what=what, step=step))
        if isinstance(features, LastFeatures):
            samples, width = features.values.shape
            known = self.losses if self.losses is not None and self.losses.kind == "squared" else None
            floor = None if known is None else width_floor(known, width, bias=features.bias)
            found.append(
                finding_of_width(width, samples, self.outputs, bias=features.bias, floor=floor, loss=loss, step=step)
            )
        return found


def equal_samples(inputs: Inputs) -> list[list[int]]:
    """Return the groups of more than one sample with the same inputs, by number.

    Args:
        inputs: The samples.
    """
    equal = EqualInputs()
    equal.add(inputs)
    return equal.repeated


def is_constant(outputs: Tensor) -> bool:
    """Return whether all samples have the same outputs.

    Args:
        outputs: u, (n, C).
    """
    return len(outputs) > 1 and bool((outputs == outputs[:1]).all())
