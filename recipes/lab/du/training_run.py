"""One run of a deep network of Du et al. by gradient descent, with the quantities of Lemmas B.1 to B.7 on the way."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_conv import ntk_gram
from lightning_conv.kernels.infinite import LimitKernel
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.reporting.progress import Report, silent
from lightning_conv.theory.criterion import Criterion
from lightning_conv.theory.networks import DuFC, DuResNet
from lightning_conv.theory.papers.du import (
    Movement,
    contraction_criterion,
    drift_criterion,
    initial_criterion,
    lambda_min_criterion,
    last_hidden_gram,
    layer_movement,
    layer_movement_criterion,
    layer_norms,
    layer_norms_criterion,
    layer_radius,
    linearisation,
    linearisation_criteria,
    linearised_rate,
    step_criterion,
)


@dataclass(frozen=True)
class Probe:
    """The measurements at one step k."""

    step: int
    lambda_min: Criterion  # lambda_min(G^(H)(k)) / lambda_0 against 1/2
    drift: Criterion  # |G^(H)(k) - G^(H)(0)|_2 / lambda_0 against 1/4
    whole: Bounded  # lambda_min of G(k) over all layers
    last: Bounded  # lambda_min of G^(H)(k)
    movement: float  # max_h |W^(h)(k) - W^(h)(0)|_F / sqrt(m)
    remainder: float  # |u(k+1) - u(k) + eta G(k) r(k)| / (eta |G(k) r(k)|)
    linearised: float  # 2 eta r^T G r / |r|^2
    measured: float  # 1 - |r(k+1)|^2 / |r(k)|^2
    small: tuple[Criterion, Criterion]  # Lemmas B.6 and B.7
    contracts: Criterion  # this step against 1 - eta lambda_0 / 2


@dataclass
class DeepRun:
    """One trained network."""

    name: str
    width: int
    seed: int
    eta: float
    lambda_0: Bounded
    norms: Criterion  # Lemma B.1
    start: Criterion  # |G^(H)(0) - K^(H)|_2 / lambda_0 against 1/4, Lemma B.2
    radius: float  # R' of Lemma B.5; NaN for the ResNet, which has other constants
    losses: list[float] = field(default_factory=list)  # |r(k)|^2 / 2 at k = 0, 1, ...
    probes: list[Probe] = field(default_factory=list)

    @property
    def contraction(self) -> Criterion:
        """Criterion of the theorem's rate: |r(k)|^2 <= (1 - eta lambda_0 / 2)^k |r(0)|^2 at every step k."""
        return contraction_criterion(self.losses, self.eta, self.lambda_0)

    @property
    def share(self) -> float:
        """Smallest lambda_min(G^(H)(k)) / lambda_0 over the probes."""
        return min(probe.lambda_min.measured for probe in self.probes)

    @property
    def largest_drift(self) -> float:
        """Largest |G^(H)(k) - G^(H)(0)|_2 / lambda_0 over the probes."""
        return max(probe.drift.measured for probe in self.probes)

    @property
    def moved(self) -> float:
        """Largest final movement |W^(h) - W^(h)(0)|_F / sqrt(m) of a layer over |r(0)|, to which R' is proportional."""
        return self.probes[-1].movement / math.sqrt(2 * self.losses[0])

    @property
    def remainder(self) -> float:
        """Largest relative linearisation error over the probes."""
        return max(probe.remainder for probe in self.probes)


def train(
    network: DuFC | DuResNet,
    x: Tensor,
    y: Tensor,
    limit: LimitKernel,
    *,
    seed: int,
    steps: int,
    probes: int,
    rate: float = 1.0,
    report: Report = silent,
) -> DeepRun:
    """Run gradient descent on S = 1/2 sum (u - y)^2 over all layers, the output layer a included, as in the theorems.

    Args:
        network: initialised network, trained in place.
        x: inputs of norm 1, (n, d).
        y: targets -1 and 1, (n,).
        limit: limit kernel K^(H) on x.
        seed: seed of the network, for the report.
        steps: steps of gradient descent.
        probes: number of steps that are measured, evenly spaced on a logarithmic axis.
        rate: step size in units of 1 / lambda_max(G(0)), with G over all layers.
        report: called with the share of the steps that is done.
    """
    initial = copy.deepcopy(network.state_dict())
    lambda_0, gram = limit.lambda_0, last_hidden_gram(network, x)
    eta = rate / kernel_spectrum(ntk_gram(network, x), method="auto").lambda_max.value
    outputs = network(x).detach()
    radius = (
        layer_radius(network, float((y - outputs).norm()), len(x), lambda_0.value)
        if isinstance(network, DuFC)
        else math.nan
    )
    run = DeepRun(
        type(network).__name__, network.width, seed, eta, lambda_0, layer_norms_criterion(layer_norms(network, x)),
        initial_criterion(gram, limit), radius,
    )  # fmt: skip
    moments = {0, steps} | {round(steps ** (k / max(probes - 2, 1))) for k in range(max(probes - 1, 1))}
    parameters = list(network.parameters())
    for step in range(steps + 1):
        u = network(x)
        run.losses.append(float((u.detach() - y).square().sum()) / 2)
        gradients = torch.autograd.grad((u - y).square().sum() / 2, parameters)
        if step in moments:
            run.probes.append(_probe(network, x, y, gram, initial, gradients, step, eta, lambda_0))
        if step < steps:
            descend(network, gradients, eta)
        report(step / steps)
    return run


@torch.no_grad()
def descend(network: DuFC | DuResNet, gradients: tuple[Tensor, ...], eta: float) -> None:
    """Perform one step of plain gradient descent on all weights, in place."""
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter.sub_(gradient, alpha=eta)


def _probe(
    network: DuFC | DuResNet, x: Tensor, y: Tensor, start: Tensor, initial: dict[str, Tensor], gradients: tuple[Tensor, ...], step: int,
    eta: float, lambda_0: Bounded,
) -> Probe:  # fmt: skip
    whole, last = ntk_gram(network, x), last_hidden_gram(network, x)
    after = copy.deepcopy(network)
    descend(after, gradients, eta)
    with torch.no_grad():
        before, behind = network(x), after(x)
    residual, next_residual = before - y, behind - y
    found = linearisation(before, behind, y, whole, eta)
    losses = [float(r.square().sum()) / 2 for r in (residual, next_residual)]
    return Probe(
        step=step,
        lambda_min=lambda_min_criterion(last, lambda_0),
        drift=drift_criterion(last, start, lambda_0),
        whole=kernel_spectrum(whole, method="auto").lambda_min,
        last=kernel_spectrum(last, method="auto").lambda_min,
        movement=max(each.averaged for each in layer_movement(network, initial)),
        remainder=found.relative,
        linearised=linearised_rate(whole, residual, eta),
        measured=1 - losses[1] / losses[0],
        small=linearisation_criteria(found, eta, lambda_0),
        contracts=step_criterion(losses[0], losses[1], eta, lambda_0),
    )


def movement_verdict(run: DeepRun) -> Criterion | None:
    """Judge whether no layer moved farther than R' at any probe (Lemma B.5); None where there is no R'."""
    if math.isnan(run.radius):
        return None
    farthest = max(probe.movement for probe in run.probes)
    return layer_movement_criterion([Movement("largest", farthest * math.sqrt(run.width), farthest)], run.radius)
