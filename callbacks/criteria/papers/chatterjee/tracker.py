"""``ChatterjeeTracker``: what Chatterjee's theorem proves of a run before its first step, and what the run and a search refute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_conv.arguments import require_number
from lightning_conv.callbacks.criteria.papers.chatterjee.ball import (
    BallSearch,
    ProbeLandscape,
    ball_criterion,
    search_ball,
)
from lightning_conv.callbacks.criteria.papers.chatterjee.certificate import (
    StartCertificate,
    descent_certificate,
    no_certificate,
)
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria
from lightning_conv.callbacks.run.assumptions import EVERYWHERE
from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.callbacks.run.view import RunView
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.papers.chatterjee.descent import CHATTERJEE, descent_criteria
from lightning_conv.theory.papers.chatterjee.ratio import least_radius
from lightning_conv.theory.tools.observation import infimum_of_ratios


@register_criteria
class ChatterjeeTracker(CriteriaTracker):
    """Judges the criterion 4 f_0 < r^2 alpha(w_0, r) and its consequences for gradient descent.

    Args:
        radius: of the ball around the start that is searched for small |grad f|^2 / f; None: nothing is searched.

    Raises:
        MisconfigurationException: a radius that is not positive.
    """

    name, position = "chatterjee", 10
    source = CHATTERJEE
    assumes = EVERYWHERE | {"full batch", "whole set", "attained infimum", "smooth"}
    hypotheses = frozenset({"independent_inputs"})

    def __init__(self, radius: float | None = None) -> None:
        if radius is not None:
            try:
                require_number("radius", radius, above=0)
            except (TypeError, ValueError) as error:
                raise MisconfigurationException(f"{error}, or None to search nothing") from error
        self.radius = radius
        self._certificate: StartCertificate | None = None
        self._ball: BallSearch | None = None

    def measure(self, run: RunView, gram: KernelGram, spectrum: Spectrum) -> dict[str, float]:
        """Certify and search at the start; return ``least_radius``, 2 sqrt(f_0 / inf a): the criterion fails for every smaller r."""
        if len(run.history) == 1 and self._certificate is None:
            self._look_at_start(run)
        infimum, start = infimum_of_ratios(run.history), run.history[0].loss
        if not (0 < infimum < math.inf and start > 0):
            return {}
        return {"least_radius": least_radius(start, infimum)}

    def criteria(self, run: RunView) -> list[Criterion]:
        """Return the proven score and step, the criterion in the ball, and the consequences for descent."""
        certified: list[Criterion] = []
        if self._certificate is not None:
            largest = math.nan if run.scale is None else run.scale.step_on_mean(run.largest_rate)
            certified = self._certificate.criteria(largest)
        in_the_ball = ball_criterion(run.history, self._ball, self.radius, infimum=run.infimum)
        return [*certified, in_the_ball, *descent_criteria(run.history)]

    def _look_at_start(self, run: RunView) -> None:
        why = run.violated(self.assumes) if run.step == 0 else "the run was not observed from its first step"
        unproven = why or ("" if run.scale is not None else "the certificate is about the squared loss, nn.MSELoss")
        self._certificate = (
            no_certificate(unproven)
            if unproven
            else descent_certificate(run.network, run.measurement.inputs, run.targets)
        )
        if self.radius is not None:
            self._ball = BallSearch((), why) if why else self._search(run, self.radius)

    @staticmethod
    def _search(run: RunView, radius: float) -> BallSearch:
        loss_fn, targets = run.loss.loss_fn, run.loss_targets
        if loss_fn is None or targets is None:
            return BallSearch((), "the loss is not known")
        mean = None if run.scale is None else targets.double().reshape(len(targets), -1).mean(0)
        with attempted() as attempt:  # if it fails, the run's own path is judged
            landscape = ProbeLandscape(
                run.network, run.inputs, targets, loss_fn, run.measurement.parameters, run.infimum
            )
            return search_ball(landscape, radius, mean=mean)
        why = f"the ball around the start was not searched ({attempt.reason})"
        rank_zero_warn(f"ConvergenceCriteria: {why}")
        return BallSearch((), why)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types, for a checkpoint."""
        return {
            "certificate": None if self._certificate is None else self._certificate.state(),
            "ball": None if self._ball is None else self._ball.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        certificate, ball = state.get("certificate"), state.get("ball")
        self._certificate = None if certificate is None else StartCertificate.from_state(certificate)
        self._ball = None if ball is None else BallSearch.from_state(ball)
