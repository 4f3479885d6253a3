"""Criteria of the weights alone, without a step: expressivity, and what is proven at the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.expressivity.certificate import RankCertificate
from lightning_conv.expressivity.singular import feature_rounding
from lightning_conv.networks.evaluation import Inputs, StatelessModule, undisturbed
from lightning_conv.networks.head import find_head, last_hidden_features
from lightning_conv.theory.criterion import Criterion, at_most, not_applicable
from lightning_conv.theory.papers.chatterjee import affine_independence, certify_descent, judge_positive_start
from lightning_conv.theory.papers.chatterjee.descent import CHATTERJEE
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import SOURCE as KAWAGUCHI
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import ExpressivityFacts, expressivity_facts
from lightning_conv.theory.tools.smooth_mlp import read_mlp

ALLEN_ZHU = "Allen-Zhu, Li & Song 2019 (1811.03962)"


def voided(criterion: Criterion, reason: str) -> Criterion:
    """The same, not applicable: the measured number stays, the bound means nothing."""
    return replace(criterion, bound=math.nan, verdict="not applicable", reason=reason)


def expressivity(network: nn.Module, inputs: Inputs, targets: Tensor | None) -> ExpressivityFacts | Criterion:
    """Rank [h, 1] = n of the last hidden features in eval mode, and whether the targets lie in their range.

    What rounding inside the trunk changes is estimated from a float32 evaluation, whatever the network's type.

    Args:
        network: left as it is.
        inputs: on the network's device.
        targets: numbers or classes, one row a sample; others are left out.

    Returns:
        The facts, or a criterion that says why there are none.
    """
    try:
        head = find_head(network, inputs)
        coarse, features = (
            last_hidden_features(network, head, inputs, dtype=dtype).cpu() for dtype in (torch.float32, torch.float64)
        )
        error = feature_rounding(coarse, features)
        return expressivity_facts(features, _rows(targets, len(features)), bias=head.has_bias, feature_error=error)
    except Exception as error:  # no linear head, or one that cannot be read: the other theorems do not care
        asks = "rank [h, 1] = n, that is sigma_min([h, 1]) > 0"
        return not_applicable("expressivity_condition", KAWAGUCHI, asks, str(error))


def _rows(targets: Tensor | None, samples: int) -> Tensor | None:
    """Targets as ``certify_expressivity`` takes them, or None."""
    if targets is None or len(targets) != samples:
        return None
    if targets.is_floating_point():
        rows = targets.detach().cpu().double().reshape(samples, -1)
        return rows if float(rows.norm()) > 0 else None
    return targets.detach().cpu() if targets.ndim == 1 else None


SCORE = "4 f(x_0) < r^2 alpha(x_0, r) for some r, alpha proven on the ball"


@dataclass(frozen=True)
class StartCertificate:
    """What Chatterjee's theorem proves before the first step."""

    criterion: Criterion
    step: float = math.nan  # the largest on f = (1/n) sum (u - y)^2 that is proven to descend to zero loss; NaN: none
    hypotheses: tuple[Criterion, ...] = ()  # of the theorem on feedforward networks: data and start

    def criteria(self, largest: float) -> list[Criterion]:
        """The score, and the largest step that the run has taken against the proven one.

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
        """As plain types."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StartCertificate:
        """The inverse of ``state``."""
        hypotheses = tuple(Criterion(**each) for each in state.get("hypotheses", ()))
        return cls(Criterion(**state["criterion"]), float(state["step"]), hypotheses)


def no_certificate(reason: str) -> StartCertificate:
    """Where the certificate does not cover the run."""
    return StartCertificate(not_applicable("criterion_score_descent", CHATTERJEE, SCORE, reason))


def descent_certificate(network: nn.Module, inputs: Inputs, targets: Tensor | None) -> StartCertificate:
    """What Chatterjee's theorem proves about a smooth MLP with one output before the first step; not applicable to other networks.

    Args:
        network: at the start.
        inputs: the whole training set.
        targets: y.

    Cost: some tenths of a second; intervals for about a hundred balls.
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
        independent = voided(independent, positive.reason)
    hypotheses = (independent, positive)
    return StartCertificate(found.criterion, found.step if found.holds else math.nan, hypotheses)


def _independence(data: RankCertificate, *, bias: bool) -> Criterion:
    """Of the inputs, which the theorem on feedforward networks asks for."""
    columns = "[X, 1]" if bias else "X"
    asks = f"the inputs are {'affinely' if bias else 'linearly'} independent: lambda_min({columns} {columns}^T) > 0"
    measured = math.nan if data.sigma_min is None else data.sigma_min.value**2
    return Criterion("independent_inputs", CHATTERJEE, asks, measured, 0.0, data.verdict, data.reason)


def sole_child(network: nn.Module, inputs: Tensor) -> str:
    """Name of the module to which this one hands its inputs, as ``self.net(x)`` does, if it is the same function of inputs and weights.

    The way down ends at an ``nn.Sequential``, and at a module with parameters of its own or with several children that have some. An
    empty name is the network itself.

    Raises:
        ValueError: a child gives other outputs, at the present weights or at random ones.
    """
    path = ""
    while True:
        module = network.get_submodule(path)
        own = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
        if isinstance(module, nn.Sequential) or len(own) != 1 or any(True for _ in module.parameters(recurse=False)):
            return path
        require_same(module, own[0], inputs)
        path = f"{path}.{own[0]}" if path else own[0]


def require_same(network: nn.Module, name: str, inputs: Tensor) -> None:
    """See that a network is its submodule ``name``, the same function of inputs and weights.

    Raises:
        ValueError: it gives other outputs, at the present weights or at random ones.
    """
    child, generator = network.get_submodule(name), torch.Generator().manual_seed(0)
    with undisturbed(network), torch.no_grad():
        whole, part = StatelessModule(network, dtype=torch.float64), StatelessModule(child, dtype=torch.float64)
        rows = whole.convert(inputs)
        for draw in range(3):
            weights = {
                key: value
                if draw == 0
                else torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
                for key, value in part.parameters.items()
            }
            outputs = whole.outputs({f"{name}.{key}": value for key, value in weights.items()}, rows)
            if not torch.allclose(outputs, part.outputs(weights, rows), rtol=1e-9, atol=1e-12):
                raise ValueError(f"model: {type(network).__name__} is not its child {name!r} alone")
