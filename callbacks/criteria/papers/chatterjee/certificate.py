"""``descent_certificate``: what Chatterjee's theorem proves of a smooth fully-connected network before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_conv.callbacks.criteria.networks import sole_child
from lightning_conv.callbacks.run.assumptions import without_verdict
from lightning_conv.expressivity.certificate import RankCertificate
from lightning_conv.networks.inputs import Inputs
from lightning_conv.theory.criterion import Criterion, at_most, not_applicable
from lightning_conv.theory.papers.chatterjee import affine_independence, certify_descent, judge_positive_start
from lightning_conv.theory.papers.chatterjee.descent import CHATTERJEE
from lightning_conv.theory.tools.smooth_mlp import read_mlp

SCORE = "4 f(x_0) < r^2 alpha(x_0, r) for some r, alpha proven on the ball"


@dataclass(frozen=True)
class StartCertificate:
    """What Chatterjee's theorem proves before the first step."""

    criterion: Criterion
    step: float = (
        math.nan
    )  # the largest step on f = (1/n) sum (u - y)^2 that is proven to lead to zero loss; NaN: none is
    hypotheses: tuple[Criterion, ...] = ()  # of the theorem on feedforward networks: data and start

    def criteria(self, largest: float) -> list[Criterion]:
        """Return the score, and the largest step that the run has taken against the proven one.

        Args:
            largest: of all steps so far, on f = (1/n) sum (u - y)^2.
        """
        if math.isnan(self.step):
            return [*self.hypotheses, self.criterion]
        asks = "h <= 2 eps / sup |Hess f|, the step for which descent to zero loss is proven, at every step"
        limit = at_most("certified_step", self.criterion.source, asks, largest, self.step)
        if limit.verdict == "refuted":
            # A longer step is not proven; that it fails is not proven either.
            limit = replace(limit, verdict="undecided", reason=f"{limit.reason}, beyond which nothing is proven")
        return [*self.hypotheses, self.criterion, limit]

    def state(self) -> dict[str, Any]:
        """Return the certificate as plain types."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StartCertificate:
        """Rebuild a certificate from what ``state`` returned."""
        hypotheses = tuple(Criterion(**each) for each in state.get("hypotheses", ()))
        return cls(Criterion(**state["criterion"]), float(state["step"]), hypotheses)


def no_certificate(reason: str) -> StartCertificate:
    """Return a certificate that proves nothing, for ``reason``."""
    return StartCertificate(not_applicable("criterion_score_descent", CHATTERJEE, SCORE, reason))


def descent_certificate(network: nn.Module, inputs: Inputs, targets: Tensor | None) -> StartCertificate:
    """Return what Chatterjee's theorem proves about a smooth MLP with one output; ``not applicable`` for other networks.

    Args:
        network: at the start.
        inputs: the whole training set.
        targets: y.

    Cost: some tenths of a second, for interval bounds on about a hundred balls.
    """
    if not isinstance(inputs, Tensor) or targets is None or not targets.is_floating_point():
        return no_certificate("the certificate needs one tensor of inputs, and numbers as targets")
    x, y = inputs.detach().cpu().double().flatten(1), targets.detach().cpu().double().flatten()
    try:
        mlp = read_mlp(network.get_submodule(sole_child(network, inputs)))
        data = affine_independence(x, bias=mlp.first.bias_trained)
        found = certify_descent(mlp, x, y, data=data)
    except (ValueError, TypeError, RuntimeError) as error:
        return no_certificate(f"the certificate covers smooth fully-connected networks with one output ({error})")
    independent, positive = _independence(data, bias=mlp.first.bias_trained), judge_positive_start(mlp)
    if positive.verdict == "not applicable":  # the theorem on feedforward networks is about that start alone
        independent = without_verdict(independent, positive.reason)
    hypotheses = (independent, positive)
    return StartCertificate(found.criterion, found.step if found.holds else math.nan, hypotheses)


def _independence(data: RankCertificate, *, bias: bool) -> Criterion:
    """Return the criterion that the inputs are independent, a hypothesis of the theorem on feedforward networks."""
    columns = "[X, 1]" if bias else "X"
    asks = f"the inputs are {'affinely' if bias else 'linearly'} independent: lambda_min({columns} {columns}^T) > 0"
    measured = math.nan if data.sigma_min is None else data.sigma_min.value**2
    return Criterion("independent_inputs", CHATTERJEE, asks, measured, 0.0, data.verdict, data.reason)
