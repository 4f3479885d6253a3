"""Phase 1 of Kawaguchi and Sun's algorithm, in which everything is trained, and the switch; [h, 1] is measured on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_conv.networks.perturbation import perturb
from lightning_conv.recipes.lab.report import log_spaced
from lightning_conv.recipes.models import wide_fc
from lightning_conv.reporting.progress import Report, silent
from lightning_conv.theory.papers.kawaguchi_sun.expressivity import ExpressivityFacts, expressivity_facts

RATE, MOMENTUM, BATCH = 0.02, 0.9, 32
LOOKS = 24


@dataclass(frozen=True)
class Look:
    """The facts about [h, 1] of all samples, and the loss, after some steps of phase 1."""

    step: int
    loss: float
    facts: ExpressivityFacts


@dataclass(frozen=True)
class PhaseOne:
    """A network that was trained and then perturbed; its trunk is frozen from then on."""

    network: nn.Sequential
    looks: list[Look]  # measurements from the start to step tau
    after: Look  # measurement after the noise was added

    @property
    def trunk(self) -> nn.Module:
        """The network without its head."""
        return self.network.get_submodule("trunk")

    @property
    def head(self) -> Tensor:
        """W_tau with the bias as its last row, (m_H + 1, C)."""
        layer = self.network.get_submodule("head")
        assert isinstance(layer, nn.Linear)
        return torch.cat([layer.weight.detach().T, layer.bias.detach()[None]])

    def curve(self) -> dict[str, Any]:
        """Return ``step``, ``loss``, the ranks and ``sigma_min``, one entry per measurement; the last one is after the noise."""
        seen = [*self.looks, self.after]
        return {
            "step": [look.step for look in seen], "loss": [look.loss for look in seen],
            "rank": [look.facts.certificate.rank_lower for look in seen], "stable rank": [look.facts.stable_rank for look in seen],
            "effective rank": [look.facts.effective_rank for look in seen],
            "sigma_min": [0.0 if (sigma := look.facts.certificate.sigma_min) is None else sigma.value for look in seen],
        }  # fmt: skip


def phase_one(
    inputs: Tensor,
    labels: Tensor,
    width: int,
    *,
    beta: float,
    steps: int,
    noise: float,
    seed: int,
    report: Report = silent,
) -> PhaseOne:
    """Train a network with ``width`` units in its last hidden layer by SGD, then add the noise of the switch.

    Args:
        inputs: (n, pixels), float64.
        labels: class of each sample, 0 to 9, (n,).
        width: number m_H of units.
        beta: sharpness of the softplus.
        steps: number tau of mini-batch steps.
        noise: size of the noise, relative to the root mean square of each tensor.
        seed: seed of weights, batches and noise; the global generator is not touched.
        report: called with the share of the steps that is done.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = wide_fc(inputs.shape[1], 10, width=width, beta=beta).double()
    generator, loss_fn = torch.Generator().manual_seed(seed), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM)
    trunk = network.get_submodule("trunk")

    def look(step: int) -> Look:
        with torch.no_grad():
            return Look(step, float(loss_fn(network(inputs), labels)), expressivity_facts(trunk(inputs)))

    wanted = log_spaced(steps, LOOKS)
    looks, batches = [look(0)], _batches(len(labels), generator)
    for step in range(1, steps + 1):
        rows = batches()
        optimizer.zero_grad()
        loss_fn(network(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        if step in wanted:
            looks.append(look(step))
        report(step / steps)
    perturb(dict(trunk.named_parameters()), noise, seed)
    network.requires_grad_(False).eval()
    return PhaseOne(network, looks, look(steps))


def _batches(samples: int, generator: torch.Generator) -> Callable[[], Tensor]:
    """Return a function that gives the next batch of an order that is drawn anew every epoch."""
    waiting: list[Tensor] = []

    def draw() -> Tensor:
        if not waiting:
            waiting.extend(torch.split(torch.randperm(samples, generator=generator), min(BATCH, samples)))
        return waiting.pop()

    return draw
