"""``StartEvidence``: what Chatterjee's theorem proves of a run before its first step, and what a search around its start refutes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_conv.callbacks.criteria.certificates import StartCertificate, descent_certificate, no_certificate
from lightning_conv.callbacks.criteria.observer import Observer
from lightning_conv.callbacks.criteria.papers.chatterjee_ball import BallSearch, ProbeLandscape, search_ball
from lightning_conv.callbacks.run.batch import to_device
from lightning_conv.callbacks.run.measurement import ProbeKernel


class StartEvidence:
    """Of one run.

    Args:
        radius: of the ball around the start that is searched for small |grad f|^2 / f; None: nothing is searched.
    """

    def __init__(self, radius: float | None) -> None:
        self.radius = radius
        self.certificate: StartCertificate | None = None
        self.ball: BallSearch | None = None

    def look(self, trainer: pl.Trainer, kernel: ProbeKernel, observer: Observer, *, squared: bool, why: str) -> None:
        """At the weights of the start.

        Args:
            trainer: of the run.
            kernel: of the probe.
            observer: that knows the loss.
            squared: whether the loss is a multiple of the squared one.
            why: the theorem does not cover the run; empty if it does.
        """
        network = kernel.probe.network(trainer.lightning_module)
        if trainer.global_step > 0:
            why = "the run was not seen from its first step on"
        unproven = why or ("" if squared else "the certificate is about the squared loss, nn.MSELoss")
        self.certificate = (
            no_certificate(unproven) if unproven else descent_certificate(network, kernel.inputs, kernel.targets)
        )
        if self.radius is not None:
            self.ball = (
                BallSearch((), why) if why else self._search(trainer, kernel, observer, self.radius, squared=squared)
            )

    @staticmethod
    def _search(
        trainer: pl.Trainer, kernel: ProbeKernel, observer: Observer, radius: float, *, squared: bool
    ) -> BallSearch:
        module = trainer.lightning_module
        loss_fn, targets = observer.loss(module), kernel.targets
        if loss_fn is None or targets is None:
            return BallSearch((), "the loss is not known")
        mean = targets.double().reshape(len(targets), -1).mean(0) if squared else None
        try:
            landscape = ProbeLandscape(
                kernel.probe.network(module), to_device(kernel.inputs, module.device), targets, loss_fn, kernel.parameters,
                observer.infimum,
            )  # fmt: skip
            return search_ball(landscape, radius, mean=mean)
        except Exception as error:  # the run goes on, its own path is judged
            why = f"the ball around the start was not searched ({type(error).__name__}: {error})"
            rank_zero_warn(f"ConvergenceCriteria: {why}")
            return BallSearch((), why)

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {
            "certificate": None if self.certificate is None else self.certificate.state(),
            "ball": None if self.ball is None else self.ball.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        certificate, ball = state.get("certificate"), state.get("ball")
        self.certificate = None if certificate is None else StartCertificate.from_state(certificate)
        self.ball = None if ball is None else BallSearch.from_state(ball)
