"""``DuTracker``: Du et al. 2019 in a run, and the run beside its linearisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from typing_extensions import override

from lightning_conv.callbacks.criteria.papers.du.evidence import DuEvidence
from lightning_conv.callbacks.criteria.papers.du.kernel import DU, OWN, not_of_the_paper
from lightning_conv.callbacks.criteria.papers.du.projection import LabelProjection
from lightning_conv.callbacks.criteria.papers.du.steps import LinearisedSteps
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria
from lightning_conv.callbacks.run.assumptions import EVERYWHERE, without_verdict
from lightning_conv.callbacks.run.guarded import guarded
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.callbacks.run.worst_step import worst_at
from lightning_conv.kernels.contraction import is_full
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.losses.scale import LossScale
from lightning_conv.reporting.plots import plot_label_projection
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.du.descent import step_contraction_criterion
from lightning_conv.theory.tools.observation import Observation

COMPARED_WITH_START = frozenset(
    {"own_lambda_min_share", "kernel_drift", "limit_distance", "layer_norms", "layer_movement", "neuron_movement"}
)
"""Names of the criteria that compare with the start."""

NOT_OBSERVED_FROM_START = "the run was not observed from its first step, and the lemmas are about its initialisation"


@register_criteria
class DuTracker(CriteriaTracker):
    """Judges the assumptions and conclusions of Du et al. 2019: kernel, weight movement, contraction per step, linearisation error.

    The linearisation (``linearisation_error``, ``residual_predicted``) needs the full kernel and a squared loss.
    """

    name, position = "du", 20
    source = DU
    assumes = EVERYWHERE | {"full batch", "whole set", "squared loss"}
    """Where none is violated, a step is one of gradient descent on the probe's squared loss."""
    needs = frozenset({"activity"})

    def __init__(self) -> None:
        self.projection = LabelProjection()  # of the error on the first kernel's eigenvectors
        self._evidence = DuEvidence()
        self._steps = LinearisedSteps()
        self._last: tuple[KernelGram, Spectrum] | None = None  # the last kernel

    def begin(self, run: RunView) -> None:
        """Detect a network of the papers and compute its limit kernel."""
        max_memory = run.measurement.probe.max_memory
        self._evidence.begin(run.network, run.inputs, run.measurement.parameters, max_memory)

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Return the movement of the papers' networks, and the error |u - y| with its prediction from the first kernel."""
        self._last, start = (gram, spectrum), run.start_weights
        self._evidence.measure(run.network, run.inputs, run.targets, gram, spectrum, start, run.step)
        self._steps.begin()
        with guarded(run.step, "ConvergenceCriteria: the linearised error is left out") as attempt:
            self._linearise(run, gram, spectrum)
        if attempt.failed:
            self.projection.stop()
        return self._evidence.quantities(run.network, start) | self.projection.quantities()

    def _linearise(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> None:
        """Store the kernel and the outputs for the linearisation of the next step, and compare the error with its prediction."""
        last, scale = run.history[-1], run.scale
        if scale is None or math.isnan(last.loss):
            return
        # Outputs that a cast inside the network rounds do not show how far a step is from a linear one.
        if is_full(gram) and not gram.narrow and not run.violated(self.assumes - {"unclipped"}):
            self._steps.measure(run.exact_outputs, gram, spectrum)
        if run.violated(self.assumes) or not is_full(gram) or run.targets is None:
            self.projection.stop()
        elif not self.projection.begun:
            outputs = run.exact_outputs.cpu()
            y = run.targets.cpu().double().reshape(outputs.shape)
            self.projection.begin(gram, outputs - y, y, scale.k, last.step)
        self.projection.measure(last.step, math.sqrt(2 * max(last.loss, 0.0) / scale.k))

    @property
    @override
    def notes_steps(self) -> bool:
        return self.projection.follows

    def before_step(self, run: RunView, rate: float) -> None:
        """Record the size of the step for the predicted error."""
        self.projection.before_step(rate)

    def observe(self, run: RunView, step: Observation) -> dict[str, float]:
        """Return ``linearisation_error``, and the ends between which the linearised rate lies.

        The ends are bounds of 2 eta lambda_min(G) from below and of 2 eta lambda_max(G) from above.
        """
        if run.scale is None or run.targets is None or self._last is None:
            return {}
        eta = run.scale.step_on_sum(step.step_size)
        if self._steps.waits:
            lambda_0 = self._evidence.lambda_0 if self._evidence.deep else None
            what = f"ConvergenceCriteria: the step after step {step.step} is not linearised"
            with guarded(None, what) as attempt:
                self._steps.observe(run.exact_outputs, run.targets, step, eta, lambda_0)
            if attempt.failed:
                self._steps.begin()
        gram, spectrum = self._last
        if not is_full(gram) or math.isnan(eta):
            return self._steps.quantities()
        least, greatest = max(spectrum.lambda_min.lower, 0.0), spectrum.lambda_max.upper
        ends = {"rate_linearised_least": 2 * eta * least, "rate_linearised_greatest": 2 * eta * greatest}
        return self._steps.quantities() | ends

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return the criteria on kernel, weights and linearised steps, and ``step_contraction``."""
        found = [*self._evidence.criteria(), *(self._steps.criteria() if self._evidence.deep else [])]
        if not run.from_the_start:
            found = [
                without_verdict(each, NOT_OBSERVED_FROM_START) if each.name in COMPARED_WITH_START else each
                for each in found
            ]
        seen = [each for each in run.history if not math.isnan(each.next_loss) and not math.isnan(each.step_size)]
        if not seen or run.scale is None or self._last is None or not is_full(self._last[0]):
            return found
        return [*found, self._contraction(seen, run.scale)]

    def _contraction(self, seen: list[Observation], scale: LossScale) -> Criterion:
        """Judge the contraction at the step where it was worst."""
        lambda_0 = self._evidence.lambda_0
        steps = [(each, scale.step_on_sum(each.step_size)) for each in seen]
        judged = [pair for pair in steps if pair[0].resolved and lambda_0.value > 0]
        if judged:
            each, step = max(judged, key=lambda pair: pair[0].contraction + pair[1] * lambda_0.value / 2)
            worst = worst_at(step_contraction_criterion(each.contraction, step, lambda_0), each.step)
        else:
            last = seen[-1]
            why = "the change of the loss is rounding" if not last.resolved else "lambda_0 is not resolved above 0"
            unseen = step_contraction_criterion(last.contraction, math.nan, lambda_0)
            worst = replace(unseen, measured=last.contraction, verdict="undecided", reason=why)
        if self._evidence.of_the_paper:
            return worst
        return not_of_the_paper(replace(worst, source=f"after {worst.source}", asks=f"{worst.asks}, {OWN}"))

    def figures(self) -> Mapping[str, Callable[[], Figure]]:
        """Return the share of the labels on the leading eigenvectors, above the error that they predict and the one measured."""
        projection = self.projection
        if not projection.shares:
            return {}
        return {"label_projection": lambda: plot_label_projection(projection.shares, projection.curve)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {
            "evidence": self._evidence.state_dict(),
            "steps": self._steps.state_dict(),
            "projection": self.projection.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._evidence.load_state_dict(state["evidence"])
        self._steps.load_state_dict(state["steps"])
        if "projection" in state:
            self.projection.load_state_dict(state["projection"])
        else:  # an older version did not store it: the steps before are not known
            self.projection.stop()
