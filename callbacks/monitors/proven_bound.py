"""``ProvenBound``: what the kernel over some of the parameters proves of lambda_min over all of them, in one run."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_conv.callbacks.monitors.beginning import Beginning
from lightning_conv.callbacks.monitors.by_optimizer import monitors_of
from lightning_conv.callbacks.run.assumptions import violated
from lightning_conv.callbacks.run.data.samples import data_violations
from lightning_conv.callbacks.run.measured_kernel import tags_of
from lightning_conv.callbacks.run.measurement import Measurement
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.health.finding import Finding
from lightning_conv.health.findings.of_course import finding_of_subset
from lightning_conv.health.kernel.subset_bound import SubsetBound, subset_bound
from lightning_conv.health.kernel.subset_parameters import Subset, require_subset
from lightning_conv.health.wording import figure, listed
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.rounding import float32_down


def asked_bound(bound: Subset, probe: Probe, per_layer: str | None) -> tuple[str, ...]:
    """Return the patterns of a bound.

    Args:
        bound: As the user has given it.
        probe: The settings of the kernel.
        per_layer: See ``LambdaMin``.

    Raises:
        MisconfigurationException: It names nothing, or the other settings are of what a bound does not have.
    """
    try:
        patterns = require_subset(bound, argument="bound")
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"LambdaMin: {error}") from error
    beside = f"LambdaMin: bound={bound!r}"
    if probe.outputs == "projected":
        raise MisconfigurationException(
            f'{beside} proves, and Probe(outputs="projected") estimates; leave outputs= out, or take "trace", "full", "sum" or "loss"'
        )
    if probe.precision not in (None, "certified"):
        raise MisconfigurationException(
            f'{beside} needs precision="certified", not Probe(precision={probe.precision!r}); leave precision= out'
        )
    if per_layer == "spectra":
        raise MisconfigurationException(
            f'{beside} measures no whole kernel, so per_layer="spectra" has none to split; use another LambdaMin for it'
        )
    return tuple(patterns)


class ProvenBound:
    """The bound of the last measurement.

    Attributes:
        found: The bound; None: nothing was measured yet.
        finding: What it proves, in a sentence; None: nothing.
        words: The same, or why nothing is proven; empty before the first measurement.
    """

    def __init__(self) -> None:
        self.found: SubsetBound | None = None
        self.finding: Finding | None = None
        self.words = ""
        self._on_training_set: bool | None = None  # looked at once per fit

    def begin(self) -> None:
        """Begin a fit: its data may be others."""
        self._on_training_set = None

    def measure(self, run: RunView, gram: KernelGram, smallest: Bounded, whole: Bounded | None) -> dict[str, float]:
        """Return the bound as a scalar: the proven lower end, or 0, below which no kernel has an eigenvalue.

        It is rounded down to float32, in which loggers keep it.

        Args:
            run: The run at this moment.
            gram: The kernel over some of the parameters.
            smallest: Its lambda_min.
            whole: That of the kernel over all of them on the same samples, where it is known.

        Raises:
            ValueError: The whole kernel's lambda_min is proven to be below the bound, so one of them is wrong.
        """
        if self._on_training_set is None:
            # Where inputs are augmented, every epoch has other samples than the probe.
            self._on_training_set = not violated(data_violations(run), ["whole set", "fixed data"])
        self.found = subset_bound([gram], [smallest], on_training_set=self._on_training_set, whole=whole)
        self.finding = finding_of_subset(self.found, step=run.step)
        self.words = self._why_not(gram, smallest) if self.finding is None else self.finding.sentence
        lower = 0.0 if self.finding is None else float32_down(self.finding.lower)
        return {f"{tags_of(gram)}/lambda_min_bound": lower}

    def _why_not(self, gram: KernelGram, smallest: Bounded) -> str:
        if smallest.certified:
            why = "which does not stand clear of its rounding error; name more parameters, or take fewer samples"
        else:
            why = f"which is not certified: {smallest.reason or gram.narrow or 'it was not computed in float64'}"
        return (
            f"Nothing is proven of the smallest eigenvalue: that of the kernel over {listed(gram.parameters)} is "
            f"{figure(smallest.value)}, {why}."
        )

    @property
    def text(self) -> str:
        """The words with all parameters, in Markdown."""
        names = () if self.found is None else self.found.parameters
        return f"{self.words}\n\nParameters: {', '.join(f'`{name}`' for name in names)}"


def whole_lambda_min(trainer: pl.Trainer, bound: Measurement, optimizer: str) -> Bounded | None:
    """Return lambda_min of the kernel over all parameters, where another monitor has measured it at this step on the same samples.

    Args:
        trainer: Trainer of the run.
        bound: The measurement over some of the parameters.
        optimizer: Name of the optimizer whose network it is.
    """
    step = trainer.global_step
    for each in monitors_of(trainer, Beginning):  # type: ignore[type-abstract]
        other = each._kernel
        if each.bound is not None or each.optimizer != optimizer or other is None or not other.has(step):
            continue
        if other.is_like(bound) and set(bound.parameters) <= set(other.parameters):
            return other.at(step)[1].lambda_min
    return None
